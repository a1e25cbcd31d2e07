/* Being a daemon with a child: its word to the starter, small files, starting COMMAND, and waiting
 * for news of it and of the terminal that it may have. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "keeper.h"

/* Which process this is: it decides where a complaint goes. */
static enum { STARTER, KEEPER, CHILD } we = STARTER;

int line = STDERR_FILENO, dir = AT_FDCWD, master = -1, out = -1;
static int signals = -1;

/* ---- words ---- */

bool record(const char *file, const char *format, ...)
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

_Noreturn void refuse(const char *format, ...)
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

_Noreturn void die(const char *doing, const char *object)
{
    refuse("cannot %s %s: %s", doing, object, strerror(errno));
}

void answer(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vdprintf(line, format, args);
    va_end(args);
    close(line);
    line = -1;
}

/* ---- files ---- */

char *slurp(int at, const char *path, char *text, size_t size)
{
    int fd = openat(at, path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[length > 0 ? length : 0] = 0;
    return text;
}

bool spill(const char *path, const char *text)
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

int open_file(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600); /* no FIFO holds us up */
    if (fd < 0)
        die("open", path);
    return fd;
}

void make_blocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
}

void point_stdio(int in, int output)
{
    int null = open_file("/dev/null", O_RDWR);
    dup2(in < 0 ? null : in, STDIN_FILENO);
    dup2(output < 0 ? null : output, STDOUT_FILENO);
    dup2(output < 0 ? null : output, STDERR_FILENO);
    close(null);
}

void close_inherited(void)
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

void leave_starter(void)
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

pid_t spawn(void (*prepare)(void), char why[LINE])
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

/* ---- watching ---- */

bool relay(void)
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

bool await_news(int timeout_ms, int pidfd)
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

bool outlive(pid_t pid, siginfo_t *end, bool pass_on)
{
    bool asked = false;
    for (end->si_pid = 0; waitid(P_PID, pid, end, WEXITED | WNOHANG) || !end->si_pid;)
        if (await_news(-1, -1) && pass_on) {
            asked = true;
            kill(pid, SIGTERM);
        }
    return asked;
}

const char *fate(const siginfo_t *end)
{
    static char text[32];
    snprintf(text, sizeof text, "%s %d%s", end->si_code == CLD_EXITED ? "exit" : "signal",
             end->si_status, end->si_code == CLD_DUMPED ? " core" : "");
    return text;
}
