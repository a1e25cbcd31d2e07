/* krg-keeper: what outlives everything else of krgfs on a node. Three modes:
 *
 *   tree     parent and reaper of one tree; keeps its terminal and its exit status. COMMAND is a
 *            program, or, with --pidfile, a `criu restore --restore-detached` that makes the tree.
 *   as       exec COMMAND under another uid with the capabilities that we have.
 *   respawn  start COMMAND again when it dies, where no init does that.
 *
 * A keeper never ends a tree that runs, and whatever befalls its starter, the files in --dir say
 * what happened. It uses no heap of its own and has no threads: one loop of poll and waitid. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <linux/capability.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "keeper.h"

struct said opt = {.uid = -1, .gid = -1};

/* ---- the command line ---- */

static int number(const char *text, const char *option)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < 0 || value > INT32_MAX)
        refuse("%s takes a number, not '%s'", option, text);
    return value;
}

/* The place for one more of what may be given MANY times. */
static int another(int *count, const char *option)
{
    if (*count == MANY)
        refuse("%s can be given %d times", option, MANY);
    return (*count)++;
}

static void parse_owner(const char *text)
{
    int length = 0;
    if (sscanf(text, "%u:%u%n", &opt.uid, &opt.gid, &length) != 2 || text[length])
        refuse("--owner takes UID:GID, not '%s'", text);
}

/* N=FILE:MODE, where FILE may have colons of its own. */
static struct inherit inherit_of(char *text)
{
    static const struct { const char *word; int flags; } modes[] = {
        {"r", O_RDONLY},
        {"w", O_WRONLY | O_CREAT | O_TRUNC},
        {"a", O_WRONLY | O_CREAT | O_APPEND},
    };
    char *path = strchr(text, '='), *mode = strrchr(text, ':');
    if (!path || !mode || mode < path)
        refuse("--inherit takes N=FILE:MODE, not '%s'", text);
    *path++ = *mode++ = 0;
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(mode, modes[i].word))
            return (struct inherit){number(text, "--inherit"), path, modes[i].flags};
    refuse("--inherit takes the modes r, w and a, not '%s'", mode);
}

static void parse(int argc, char **argv, const struct option *options)
{
    for (int c; (c = getopt_long(argc, argv, "+", options, NULL)) != -1;)
        switch (c) {
        case 'd': opt.dir = optarg; break;
        case 'p': opt.pidfile = optarg; break;
        case 'n': opt.new_pid = true; break;
        case 'f': opt.first_pid = number(optarg, "--first-pid"); break;
        case 'c': opt.cgroups[another(&opt.cgroup_count, "--cgroup")] = optarg; break;
        case 'o': opt.out = optarg; break;
        case 'O': parse_owner(optarg); break;
        case 't': opt.pty = true; break;
        case 'l': opt.log = optarg; break;
        case 'u': opt.uid = number(optarg, "--uid"); break;
        case 'g': opt.gid = number(optarg, "--gid"); break;
        case 'D': opt.drop_caps = true; break;
        case 'N': opt.name = optarg; break;
        case 'i':
            opt.inherits[another(&opt.inherit_count, "--inherit")] = inherit_of(optarg);
            break;
        case 'G':
            for (char *gid = strtok(optarg, ","); gid; gid = strtok(NULL, ","))
                opt.groups[another(&opt.group_count, "--groups")] = number(gid, "--groups");
            break;
        default: _exit(2); /* getopt has said what is wrong */
        }
    opt.command = argv + optind;
    if (!*opt.command)
        refuse("%s: COMMAND is missing after --", argv[0]);
}

/* ---- as ---- */

/* Ambient capabilities survive the exec of a program that has none of its own. */
static void raise_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct half[2];
    if (syscall(SYS_capget, &header, half))
        die("read", "our capabilities");
    for (int i = 0; i < 2; i++)
        half[i].effective = half[i].inheritable = half[i].permitted;
    if (syscall(SYS_capset, &header, half))
        die("make inheritable", "our capabilities");
    for (int cap = 0; cap < 64; cap++)
        if (half[cap / 32].permitted & 1U << cap % 32
            && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0))
            die("make ambient", "our capabilities");
}

static void as(void)
{
    if (opt.uid == (uid_t)-1 || opt.gid == (gid_t)-1)
        refuse("as needs --uid and --gid");
    if (setgroups(opt.group_count, opt.groups) || setresgid(opt.gid, opt.gid, opt.gid))
        die("take", "the groups");
    if (prctl(PR_SET_KEEPCAPS, !opt.drop_caps) || setresuid(opt.uid, opt.uid, opt.uid))
        die("take", "the uid");
    if (!opt.drop_caps)
        raise_capabilities();
    execvp(opt.command[0], opt.command);
    die("run", opt.command[0]);
}

/* ---- respawn ---- */

static long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000L + now.tv_nsec / 1000000;
}

static bool asked_within(long ms)
{
    for (long until = now_ms() + ms, left; (left = until - now_ms()) > 0;)
        if (await_news(left, -1))
            return true;
    return false;
}

static void prepare_nothing(void)
{
}

static void respawn(void)
{
    const char *name = opt.name ? opt.name : opt.command[0];
    char why[LINE];
    int log_file = -1;
    close_inherited();
    leave_starter();
    if (opt.log)
        make_blocking(log_file = open_file(opt.log, O_WRONLY | O_CREAT | O_APPEND));
    if (opt.pidfile && !record(opt.pidfile, "%d\n", getpid()))
        die("write", opt.pidfile);
    point_stdio(-1, log_file);
    for (long pause_ms = 100;; pause_ms = pause_ms < 2500 ? 2 * pause_ms : 5000) {
        long born = now_ms();
        siginfo_t end;
        pid_t pid = spawn(prepare_nothing, why);
        if (line >= 0 && !pid && opt.pidfile)
            unlink(opt.pidfile);
        if (line >= 0 && !pid)
            refuse("%s", why);
        if (line >= 0)
            answer("ok %d %d\n", getpid(), pid);
        bool asked = pid && outlive(pid, &end, true);
        if (asked || (pid && end.si_code == CLD_EXITED && end.si_status == 0))
            break;
        if (now_ms() - born >= 10000)
            pause_ms = 100;
        dprintf(STDERR_FILENO, "krg-keeper: %s ended: %s; it starts again in %ld ms\n", name,
                pid ? fate(&end) : why, pause_ms);
        if (asked_within(pause_ms))
            break;
    }
    if (opt.pidfile)
        unlink(opt.pidfile);
}

/* ---- modes ---- */

#define VALUE(name, letter) {name, required_argument, NULL, letter}
#define FLAG(name, letter) {name, no_argument, NULL, letter}
static const struct option tree_options[] = {
    VALUE("dir", 'd'), VALUE("pidfile", 'p'), VALUE("cgroup", 'c'), VALUE("inherit", 'i'),
    VALUE("out", 'o'), VALUE("owner", 'O'), VALUE("groups", 'G'), VALUE("log", 'l'),
    FLAG("pty", 't'), FLAG("new-pid", 'n'), VALUE("first-pid", 'f'), {0},
};
static const struct option as_options[] = {
    VALUE("uid", 'u'), VALUE("gid", 'g'), VALUE("groups", 'G'), FLAG("drop-caps", 'D'), {0},
};
static const struct option respawn_options[] = {
    VALUE("name", 'N'), VALUE("pidfile", 'p'), VALUE("log", 'l'), {0},
};
static const struct {
    const char *name;
    const struct option *options;
    void (*run)(void);
} modes[] = {
    {"tree", tree_options, tree}, {"as", as_options, as}, {"respawn", respawn_options, respawn},
};

int main(int argc, char **argv)
{
    for (size_t i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(argv[1], modes[i].name)) {
            parse(argc - 1, argv + 1, modes[i].options);
            modes[i].run();
            return 0;
        }
    refuse("the modes are tree, as and respawn");
}
