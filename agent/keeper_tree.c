/* The mode `tree`: the parent and reaper of one tree, from its first process to its last. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "keeper.h"

static int host_proc = -1, slave = -1, log_file = -1;
static char old_oom_score[16];

/* The root as our pid namespace numbers it; 0 before it is known and after its end is recorded. */
static pid_t root;

/* ---- starting COMMAND ---- */

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

/* ---- the mode ---- */

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

void tree(void)
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
