/* What the rooms of krg-keeper share; keeper.c says what it is for. */
#ifndef KEEPER_H
#define KEEPER_H

#include <signal.h>
#include <stdbool.h>
#include <sys/types.h>

enum { MANY = 256, LINE = 512 };

/* What the command line said. */
struct inherit { int number; const char *path; int flags; };
struct said {
    const char *dir, *pidfile, *out, *log, *name;
    const char *cgroups[MANY];
    struct inherit inherits[MANY];
    gid_t groups[MANY];
    int cgroup_count, inherit_count, group_count, first_pid;
    bool new_pid, pty, drop_caps;
    uid_t uid;
    gid_t gid;
    char **command;
};
extern struct said opt;

/* What is held open, all close-on-exec. `line` leads to the starter, in the child to the keeper. */
extern int line, dir, master, out;

/* ---- keeper_daemon.c ---- */

/* Write FILE (in --dir, or by its path) so that a reader finds all of it or nothing. */
bool record(const char *file, const char *format, ...);

/* Say what is wrong to whoever waits for us, and end. */
_Noreturn void refuse(const char *format, ...);
_Noreturn void die(const char *doing, const char *object);

/* The keeper's one line. The starter may be gone: the files in --dir say the same. */
void answer(const char *format, ...);

/* Read a small file as a string; empty when it cannot be read. */
char *slurp(int at, const char *path, char *text, size_t size);
bool spill(const char *path, const char *text);

int open_file(const char *path, int flags);
void make_blocking(int fd);

/* Place descriptors on 0, 1 and 2; /dev/null for a negative one. */
void point_stdio(int in, int output);
void close_inherited(void);

/* Become a daemon whose answer is all that the starter gets. Signals are blocked, not ignored: none
 * ends us, and a child only has to empty its mask. */
void leave_starter(void);

/* Run COMMAND, after PREPARE in its child. Returns its pid, or 0 with the reason in WHY. */
pid_t spawn(void (*prepare)(void), char why[LINE]);

/* Append what the terminal has to --out; false when it has nothing. What cannot be written is
 * dropped: the tree must not wait for it. The \r that the terminal adds before \n is taken out. */
bool relay(void);

/* Sleep until there is news, at most TIMEOUT_MS. Returns whether we are asked to end (SIGTERM). */
bool await_news(int timeout_ms, int pidfd);

/* Wait until PID has ended. Returns whether we were asked to end, which PASS_ON tells PID too. */
bool outlive(pid_t pid, siginfo_t *end, bool pass_on);

/* "exit 3", "signal 9", "signal 6 core" */
const char *fate(const siginfo_t *end);

/* ---- keeper_tree.c ---- */

void tree(void);

#endif
