/*
 * The smallest sensible process: `small DIR [PERIOD_MS]`, default 50. It counts in memory, shows the
 * count in a mapped DIR/progress, and on SIGTERM follows its chain once more from the beginning.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define DIGITS 20

static volatile sig_atomic_t asked;

static void ask(int signum)
{
	(void)signum;
	asked = 1;
}

static void die(const char *why)
{
	if (write(2, why, strlen(why)) < 0)
		_exit(3);
	_exit(2);
}

static uint64_t follow(uint64_t chain, uint64_t number)
{
	chain ^= number * 0x9e3779b97f4a7c15u;
	chain = (chain ^ (chain >> 30)) * 0xbf58476d1ce4e5b9u;
	chain = (chain ^ (chain >> 27)) * 0x94d049bb133111ebu;
	return chain ^ (chain >> 31);
}

/* Writes the number with leading zeros; returns what is behind it. */
static char *put(char *at, uint64_t number, int digits)
{
	for (int i = digits - 1; i >= 0; i--, number /= 10)
		at[i] = (char)('0' + number % 10);
	return at + digits;
}

/* Makes a file appear whole in the working directory. */
static void say(const char *name, const char *fresh, const char *text, size_t length)
{
	int fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC, 0644);

	if (fd < 0 || write(fd, text, length) != (ssize_t)length || close(fd) < 0)
		die("cannot write in the directory\n");
	if (rename(fresh, name) < 0)
		die("cannot rename in the directory\n");
}

int main(int argc, char **argv)
{
	long period_ms = argc > 2 ? atol(argv[2]) : 50;
	struct timespec nap = { period_ms / 1000, period_ms % 1000 * 1000000 };
	struct sigaction action = { .sa_handler = ask };
	uint64_t count = 0, chain = 0, again = 0;
	char line[64], *shown;
	int fd;

	if (argc < 2 || chdir(argv[1]) < 0)
		die("usage: small DIR [PERIOD_MS]\n");
	fd = open("progress", O_RDWR | O_CREAT, 0644);
	if (fd < 0 || ftruncate(fd, DIGITS + 1) < 0)
		die("cannot make progress\n");
	shown = mmap(NULL, DIGITS + 1, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shown == MAP_FAILED)
		die("cannot map progress\n");
	close(fd);
	put(shown, 0, DIGITS)[0] = '\n';
	sigaction(SIGTERM, &action, NULL);
	strcpy(put(line, (uint64_t)getpid(), 10), "\ncounts and sleeps\n");
	say("ready", ".ready.new", line, strlen(line));

	while (!asked) {
		chain = follow(chain, count++);
		put(line, count, DIGITS);
		memcpy(shown, line, DIGITS);
		nanosleep(&nap, NULL);
	}

	for (uint64_t number = 0; number < count; number++)
		again = follow(again, number);
	if (again != chain) {
		static const char broken[] = "FAIL: the chain in memory is broken\n";

		say("verdict", ".verdict.new", broken, sizeof(broken) - 1);
		return 1;
	}
	say("verdict", ".verdict.new", "PASS\n", 5);
	return 0;
}
