/* Page-cache load: writes a file, copies it, reads the copy back and verifies it, over and over; or, of a block
 * device, reads all of it. SIGTERM ends it before its time, after the file in hand. */
#include "tool.h"

#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 65536 };

static uint64_t *block, *wanted; /* BLOCK bytes each; not static, or every worker would have them locked */
static uint64_t bytes, passes, bad;
static double slowest, last_report;
static volatile sig_atomic_t ended;

static void finish(int number)
{
    (void)number;
    ended = 1;
}

static void fill(uint64_t *to, uint64_t round, size_t at)
{
    for (size_t i = 0; i < BLOCK / 8; i++)
        to[i] = i % 2 ? round : mix(round + at + i);
}

/* Read or write one block and account for it; whether there was one. */
static bool transfer(int fd, bool writing)
{
    double begin = seconds_now();
    ssize_t n = writing ? write(fd, block, BLOCK) : read(fd, block, BLOCK);
    double now = seconds_now();
    if (n < 0)
        die(writing ? "churn: write" : "churn: read");
    bytes += (uint64_t)n;
    if (now - begin > slowest)
        slowest = now - begin;
    if (now - last_report >= 1) {
        printf("churn %llu\n", (unsigned long long)(bytes >> 20));
        last_report = now;
    }
    return n > 0;
}

static int open_or_die(const char *path, int flags)
{
    int fd = open(path, flags | O_CLOEXEC, 0600);
    if (fd < 0)
        die(path);
    return fd;
}

static void churn_files(const char *directory, size_t size, uint64_t round)
{
    char one[512], two[512];
    snprintf(one, sizeof one, "%s/churn-%d-1", directory, (int)getpid());
    snprintf(two, sizeof two, "%s/churn-%d-2", directory, (int)getpid());
    int from = open_or_die(one, O_RDWR | O_CREAT | O_TRUNC);
    int to = open_or_die(two, O_RDWR | O_CREAT | O_TRUNC);
    for (size_t at = 0; at < size; at += BLOCK) {
        fill(block, round, at);
        transfer(from, true);
    }
    lseek(from, 0, SEEK_SET);
    while (transfer(from, false))
        transfer(to, true);
    lseek(to, 0, SEEK_SET);
    for (size_t at = 0; transfer(to, false); at += BLOCK) {
        fill(wanted, round, at);
        bad += memcmp(block, wanted, BLOCK) != 0;
    }
    close(from);
    close(to);
    unlink(one);
    unlink(two);
}

int churn_main(int argc, char **argv)
{
    size_t size = 64 << 20;
    double seconds = 10;
    int option;
    while ((option = getopt(argc, argv, "s:t:")) != -1)
        switch (option) {
        case 's':
            size = parse_size(optarg) / BLOCK * BLOCK;
            break;
        case 't':
            seconds = strtod(optarg, NULL);
            break;
        default:
            return 2;
        }
    struct stat found;
    const char *where = argv[optind];
    if (where == NULL || stat(where, &found) != 0) {
        fprintf(stderr, "usage: guest-tool churn [-s SIZE] [-t SECONDS] DIRECTORY|DEVICE\n");
        return 2;
    }
    block = malloc(BLOCK);
    wanted = malloc(BLOCK);
    if (block == NULL || wanted == NULL)
        die("churn");
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct sigaction action = {.sa_handler = finish, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    double end = seconds_now() + seconds;
    do {
        if (S_ISDIR(found.st_mode)) {
            churn_files(where, size, passes);
        } else {
            int fd = open_or_die(where, O_RDONLY);
            while (transfer(fd, false) && seconds_now() < end) {
            }
            close(fd);
        }
        passes++;
    } while (!ended && seconds_now() < end);
    printf("{\"passes\": %llu, \"mib\": %llu, \"bad_blocks\": %llu, \"slowest_ms\": %.3f}\n",
           (unsigned long long)passes, (unsigned long long)(bytes >> 20), (unsigned long long)bad, slowest * 1e3);
    return bad != 0;
}
