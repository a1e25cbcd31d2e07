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
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { MANY = 256, LINE = 512 };

/* What the command line said. */
static struct {
    const char *dir, *pidfile, *out, *log, *name;
    const char *cgroups[MANY];
    struct inherit { int number; const char *path; int flags; } inherits[MANY];
    gid_t groups[MANY];
    int cgroup_count, inherit_count, group_count, first_pid;
    bool new_pid, pty, drop_caps;
    uid_t uid;
    gid_t gid;
    char **command;
} opt = {.uid = -1, .gid = -1};

/* Which process this is: it decides where a complaint goes. */
static enum { STARTER, KEEPER, CHILD } we = STARTER;

/* What is held open, all close-on-exec. `line` leads to the starter, in the child to the keeper. */
static int line = STDERR_FILENO, dir = AT_FDCWD, host_proc = -1, signals = -1;
static int master = -1, slave = -1, out = -1, log_file = -1;
static char old_oom_score[16];

/* The root as our pid namespace numbers it; 0 before it is known and after its end is recorded. */
static pid_t root;

/* ---- words ---- */

/* Write FILE (in --dir, or by its path) so that a reader finds all of it or nothing. */
static bool record(const char *file, const char *format, ...)
{
    char part[4096];
    snprintf(part, sizeof part, "%s.part", file);
    int fd = openat(dir, part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return false;
    va_list args;
    va_start(args, format);
    bool written = vdprintf(fd, format, args) > 0;
    va_end(args);
    close(fd);
    return written && renameat(dir, part, dir, file) == 0;
}

/* Say what is wrong to whoever waits for us, and end. */
static _Noreturn void refuse(const char *format, ...)
{
    static const char *const prefix[] = {"krg-keeper: ", "error ", ""};
    static const int code[] = {2, 1, 127};
    char sentence[LINE];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    if (we == KEEPER && opt.dir)
        record("launched", "error %s\n", sentence);
    dprintf(line, "%s%s\n", prefix[we], sentence);
    _exit(code[we]);
}

static _Noreturn void die(const char *doing, const char *object)
{
    refuse("cannot %s %s: %s", doing, object, strerror(errno));
}

/* The keeper's one line. The starter may be gone: the files in --dir say the same. */
static void answer(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vdprintf(line, format, args);
    va_end(args);
    close(line);
    line = -1;
}

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

/* ---- files ---- */

/* Read a small file as a string; empty when it cannot be read. */
static char *slurp(int at, const char *path, char *text, size_t size)
{
    int fd = openat(at, path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[length > 0 ? length : 0] = 0;
    return text;
}

static bool spill(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool written = write(fd, text, strlen(text)) > 0;
    int why = errno;
    close(fd);
    errno = why;
    return written;
}

static int open_file(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600); /* no FIFO holds us up */
    if (fd < 0)
        die("open", path);
    return fd;
}

/* Open a user's file as that user: no link in a directory fools root, no root_squash stops it. */
static int open_as_owner(const char *path, int flags)
{
    static gid_t ours[65536];
    if (opt.uid == (uid_t)-1 || opt.uid == geteuid())
        return open_file(path, flags);
    int our_count = getgroups(65536, ours);
    if (our_count < 0 || setgroups(opt.group_count, opt.groups))
        die("take the groups of the owner of", path);
    setfsgid(opt.gid);
    setfsuid(opt.uid);
    int fd = open_file(path, flags);
    setfsuid(geteuid());
    setfsgid(getegid());
    if (setgroups(our_count, ours))
        die("take our own groups back after opening", path);
    return fd;
}

static void make_blocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
}

/* Place descriptors on 0, 1 and 2; /dev/null for a negative one. */
static void point_stdio(int in, int output)
{
    int null = open_file("/dev/null", O_RDWR);
    dup2(in < 0 ? null : in, STDIN_FILENO);
    dup2(output < 0 ? null : output, STDOUT_FILENO);
    dup2(output < 0 ? null : output, STDERR_FILENO);
    close(null);
}

static void close_inherited(void)
{
    for (int fd = 0; fd >= 0 && fd < 3;) /* no descriptor of ours may become 0, 1 or 2 */
        fd = open("/dev/null", O_RDWR);
    if (syscall(SYS_close_range, 3, ~0U, 0))
        die("close", "the starter's descriptors");
}

/* ---- leaving the starter ---- */

/* The half that the starter waits for: it passes the keeper's one line on and is gone. */
static _Noreturn void pass_line_on(int from)
{
    char text[2 * LINE];
    ssize_t length = 0, got;
    while ((got = read(from, text + length, sizeof text - length)) > 0)
        length += got;
    if (!length)
        length = snprintf(text, sizeof text, "error the keeper died before it had an answer\n");
    bool passed = write(STDOUT_FILENO, text, length) == length;
    _exit(passed && !strncmp(text, "ok ", 3) ? 0 : 1);
}

/* Become a daemon whose answer is all that the starter gets. Signals are blocked, not ignored: none
 * ends us, and a child only has to empty its mask. */
static void leave_starter(void)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        die("make a pipe to", "the starter");
    pid_t pid = fork();
    if (pid < 0)
        die("fork", "the keeper");
    if (pid > 0) {
        close(ends[1]);
        pass_line_on(ends[0]);
    }
    close(ends[0]);
    line = ends[1];
    we = KEEPER;

    sigset_t all, news;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    signal(SIGCHLD, SIG_DFL); /* an ignored one would lose every exit status */
    sigemptyset(&news);
    sigaddset(&news, SIGCHLD);
    sigaddset(&news, SIGTERM);
    signals = signalfd(-1, &news, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0 || setsid() < 0)
        die("become", "a daemon");
}

/* ---- starting COMMAND ---- */

/* Run COMMAND, after PREPARE in its child. Returns its pid, or 0 with the reason in WHY. */
static pid_t spawn(void (*prepare)(void), char why[LINE])
{
    int ends[2];
    pid_t pid = pipe2(ends, O_CLOEXEC) ? -1 : fork();
    if (pid < 0) {
        snprintf(why, LINE, "cannot fork for %s: %s", opt.command[0], strerror(errno));
        return 0;
    }
    if (pid == 0) {
        we = CHILD;
        line = ends[1];
        prepare();
        for (int i = 1; i < NSIG; i++)
            signal(i, SIG_DFL);
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        execvp(opt.command[0], opt.command);
        die("run", opt.command[0]);
    }
    close(ends[1]);
    ssize_t length = read(ends[0], why, LINE - 1); /* nothing, once exec has closed the other end */
    close(ends[0]);
    if (length <= 0)
        return pid;
    why[length - (why[length - 1] == '\n')] = 0;
    waitpid(pid, NULL, 0);
    return 0;
}

static void place_inherits(void)
{
    int beyond = 3;
    for (int i = 0; i < opt.inherit_count; i++)
        if (opt.inherits[i].number >= beyond)
            beyond = opt.inherits[i].number + 1;
    line = fcntl(line, F_DUPFD_CLOEXEC, beyond);
    for (int i = 0; i < opt.inherit_count; i++) {
        const struct inherit *inherit = &opt.inherits[i];
        int fd = open_as_owner(inherit->path, inherit->flags);
        make_blocking(fd);
        if (fd == inherit->number ? fcntl(fd, F_SETFD, 0) : dup2(fd, inherit->number) < 0)
            die("place as a descriptor", inherit->path);
    }
}

/* A program leads a session of its own. A restored shell job joins the session of its CRIU, and the
 * end of a session's leader sends SIGHUP to the job on its terminal: there the keeper is leader. */
static void prepare_session(void)
{
    if (opt.pidfile && opt.pty) {
        setpgid(0, 0);
        tcsetpgrp(slave, getpid());
    } else if (setsid() < 0 || (opt.pty && ioctl(slave, TIOCSCTTY, 0))) {
        die("make a session for", opt.command[0]);
    }
}

/* CRIU gives its stdin to the tree as the terminal; 1 and 2 get only CRIU's own words. */
static void prepare_tree(void)
{
    bool restores = opt.pidfile;
    spill("/proc/self/oom_score_adj", old_oom_score);
    for (int i = 0; i < opt.cgroup_count; i++)
        if (!spill(opt.cgroups[i], "0"))
            die("join", opt.cgroups[i]);
    prepare_session();
    if (restores && (opt.pty || log_file >= 0))
        point_stdio(slave, log_file);
    else
        point_stdio(slave, opt.pty ? slave : out);
    place_inherits();
}

static void open_pty(void)
{
    int unlocked = 0;
    struct winsize size = {.ws_row = 24, .ws_col = 80};
    master = open_file("/dev/ptmx", O_RDWR);
    if (ioctl(master, TIOCSPTLCK, &unlocked) || ioctl(master, TIOCSWINSZ, &size)
        || (slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0
        || fchown(slave, opt.uid, -1) || (opt.pidfile && ioctl(slave, TIOCSCTTY, 0)))
        die("set up", "a pseudo terminal");
}

/* ---- watching ---- */

/* Append what the terminal has to --out; false when it has nothing. What cannot be written is
 * dropped: the tree must not wait for it. The \r that the terminal adds before \n is taken out. */
static bool relay(void)
{
    static bool held;
    char text[2048], lines[sizeof text + 1];
    ssize_t length = read(master, text, sizeof text), kept = 0;
    struct termios mode;
    bool adds_cr = !tcgetattr(master, &mode) && (mode.c_oflag & OPOST) && (mode.c_oflag & ONLCR);
    for (ssize_t i = 0; i < length; i++) {
        if (held && text[i] != '\n')
            lines[kept++] = '\r';
        held = adds_cr && text[i] == '\r';
        if (!held)
            lines[kept++] = text[i];
    }
    for (ssize_t done = 0, n; done < kept && (n = write(out, lines + done, kept - done)) > 0;)
        done += n;
    return length > 0;
}

/* Sleep until there is news, at most TIMEOUT_MS. Returns whether we are asked to end (SIGTERM). */
static bool await_news(int timeout_ms, int pidfd)
{
    struct pollfd watched[] = {{signals, POLLIN, 0}, {master, POLLIN, 0}, {pidfd, POLLIN, 0}};
    struct signalfd_siginfo news;
    bool asked = false;
    poll(watched, 3, timeout_ms);
    if (watched[1].revents)
        relay();
    while (read(signals, &news, sizeof news) > 0)
        asked |= news.ssi_signo == SIGTERM;
    return asked;
}

/* Wait until PID has ended. Returns whether we were asked to end, which PASS_ON tells PID too. */
static bool outlive(pid_t pid, siginfo_t *end, bool pass_on)
{
    bool asked = false;
    for (end->si_pid = 0; waitid(P_PID, pid, end, WEXITED | WNOHANG) || !end->si_pid;)
        if (await_news(-1, -1) && pass_on) {
            asked = true;
            kill(pid, SIGTERM);
        }
    return asked;
}

/* "exit 3", "signal 9", "signal 6 core" */
static const char *fate(const siginfo_t *end)
{
    static char text[32];
    snprintf(text, sizeof text, "%s %d%s", end->si_code == CLD_EXITED ? "exit" : "signal",
             end->si_status, end->si_code == CLD_DUMPED ? " core" : "");
    return text;
}

/* Reap what has ended, and record the root's end. Returns whether children are left. */
static bool reap(void)
{
    for (;;) {
        siginfo_t end = {0};
        if (waitid(P_ALL, 0, &end, WEXITED | WNOHANG))
            return false;
        if (!end.si_pid)
            return true;
        if (end.si_pid == root) {
            record("status", "%s\n", fate(&end));
            root = 0;
        }
    }
}

static void kill_children(void)
{
    char list[4096], *end = list;
    slurp(AT_FDCWD, "/proc/thread-self/children", list, sizeof list);
    char *last = strrchr(list, ' '); /* half a number, cut off by the size, is another process's */
    for (char *at = list; last && at < last; at = end)
        kill(strtol(at, &end, 10), SIGKILL);
}

/* Nothing of a failed attempt may run on: end it, then say so (after 5 s anyway), and end. */
static _Noreturn void give_up(const char *format, const char *what)
{
    for (int tries = 0; reap(); tries++) {
        kill_children();
        if (tries == 50)
            answer(format, what);
        await_news(100, -1);
    }
    if (line >= 0)
        answer(format, what);
    _exit(1);
}

/* ---- tree ---- */

static void enter_private_mounts(void)
{
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL)
        || mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
        die("give", "the tree a /proc of its own");
}

/* In a namespace of its own the tree's pids begin where the kernel's do after a wrap: those below
 * are for the CRIU that restores it one day. */
static void begin_pids_at(int first)
{
    static const char last_pid[] = "/proc/sys/kernel/ns_last_pid";
    char text[32];
    if (!opt.new_pid || atoi(slurp(AT_FDCWD, last_pid, text, sizeof text)) >= first - 1)
        return;
    snprintf(text, sizeof text, "%d", first - 1);
    spill(last_pid, text);
}

/* Record the pid and start time (field 22 of stat) that the starter sees. Returns that pid. */
static int record_keeper(void)
{
    char stat[1024], start[32];
    char *field = strrchr(slurp(host_proc, "self/stat", stat, sizeof stat), ')');
    for (int i = 2; field && i < 22; i++)
        field = strchr(field + 1, ' ');
    if (!field || sscanf(field, "%31s", start) != 1)
        refuse("cannot find our start time in /proc/self/stat");
    int pid = atoi(stat);
    if (!record("keeper", "%d %s\n", pid, start))
        die("write to", opt.dir);
    return pid;
}

/* Wait until the `criu restore` has ended; returns the pid of what it restored. */
static pid_t await_restored(pid_t criu)
{
    siginfo_t end;
    char text[32];
    outlive(criu, &end, false);
    record("launched", "%s\n", fate(&end));
    if (end.si_code != CLD_EXITED || end.si_status)
        give_up("failed %s\n", fate(&end));
    pid_t pid = atoi(slurp(AT_FDCWD, opt.pidfile, text, sizeof text));
    if (pid <= 0)
        give_up("error there is no pid in %s\n", opt.pidfile);
    begin_pids_at(300);
    return pid;
}

/* The host's pid of a process: a procfs shows a pidfd's pid as its own namespace numbers it. */
static int outer_pid(int pidfd)
{
    char path[64], info[512];
    snprintf(path, sizeof path, "self/fdinfo/%d", pidfd);
    char *field = strstr(slurp(host_proc, path, info, sizeof info), "\nPid:");
    return field ? atoi(field + 5) : 0;
}

/* Learn and record who the root is. Returns a pidfd to watch when it is not our child, else -1. */
static int adopt(pid_t pid, int keeper)
{
    siginfo_t end;
    int pidfd = syscall(SYS_pidfd_open, pid, 0);
    int outer = pidfd < 0 ? 0 : outer_pid(pidfd);
    if (outer <= 0)
        give_up("error the root is not there: %s\n", strerror(errno));
    root = pid;
    record("root", "%d %d\n", outer, pid);
    answer("ok %d %d %d\n", outer, pid, keeper);
    if (waitid(P_PID, pid, &end, WEXITED | WNOHANG | WNOWAIT))
        return pidfd;
    close(pidfd);
    return -1;
}

/* Reap until nobody is left. As pid 1 wait also for those who entered from outside: the kernel
 * kills them when we end, and one may be the CRIU that has just dumped the tree. */
static void keep(int foreign_root)
{
    for (;;) {
        struct pollfd ended = {foreign_root, POLLIN, 0};
        bool children = reap();
        if (root && poll(&ended, 1, 0) > 0) {
            record("status", "unknown\n");
            root = 0;
            foreign_root = -1;
        }
        bool visitors = opt.new_pid && kill(-1, 0) == 0;
        if (!children && !visitors && !root)
            break;
        await_news(children || !visitors ? -1 : 100, foreign_root);
    }
    while (relay())
        ;
}

static void open_files(void)
{
    if (opt.out)
        out = open_as_owner(opt.out, O_WRONLY | O_CREAT | O_APPEND);
    if (opt.log)
        log_file = open_file(opt.log, O_WRONLY | O_CREAT | O_APPEND);
    if (opt.pty)
        open_pty();
    else
        make_blocking(out);
}

/* The tree and its CRIU have their own copies of what we need no longer. */
static void let_go(void)
{
    point_stdio(-1, -1);
    close(log_file);
    if (!opt.pty)
        close(out);
    if (chdir("/"))
        die("enter", "/");
}

static void tree(void)
{
    char why[LINE];
    if (!opt.dir || (opt.pty && !opt.out))
        refuse("tree needs --dir, and --pty needs --out");
    close_inherited();
    if ((dir = open(opt.dir, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
        die("open", opt.dir);
    if ((host_proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
        die("open", "/proc");
    slurp(host_proc, "self/oom_score_adj", old_oom_score, sizeof old_oom_score);
    if (opt.new_pid && unshare(CLONE_NEWPID))
        die("make", "a pid namespace");
    leave_starter();

    int keeper = record_keeper();
    prctl(PR_SET_NAME, "krg-keeper");
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    spill("/proc/self/oom_score_adj", "-500"); /* without CAP_SYS_RESOURCE it stays as it is */
    if (opt.new_pid)
        enter_private_mounts();
    open_files();
    if (opt.pidfile)
        unlink(opt.pidfile); /* CRIU insists on making it */
    begin_pids_at(opt.first_pid ? opt.first_pid : opt.pidfile ? 0 : 300);

    pid_t command = spawn(prepare_tree, why);
    if (!command)
        refuse("%s", why);
    let_go();
    int foreign_root = adopt(opt.pidfile ? await_restored(command) : command, keeper);
    close(host_proc);
    keep(foreign_root);
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
