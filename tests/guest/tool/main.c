/* Dispatch to the subcommands, and what they share. */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

void die(const char *what)
{
    fprintf(stderr, "guest-tool: %s: %s\n", what, strerror(errno));
    exit(2);
}

double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

size_t parse_size(const char *text)
{
    char *end;
    size_t size = strtoul(text, &end, 10);
    switch (*end) {
    case 'G':
        size <<= 10;
        /* fall through */
    case 'M':
        size <<= 10;
        /* fall through */
    case 'K':
        size <<= 10;
        end++;
    }
    if (end == text || *end != '\0') {
        fprintf(stderr, "guest-tool: %s is no size: write it like 384M\n", text);
        exit(2);
    }
    return size;
}

void put_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (write(fd, text, strlen(text)) < 0) { /* see above */
    }
    close(fd);
}

void enter_group(const char *directory)
{
    char path[256];
    snprintf(path, sizeof path, "%s/cgroup.procs", directory);
    put_text(path, "0");
}

void become_unswappable(void)
{
    struct sched_param param = {.sched_priority = 2};
    mlockall(MCL_CURRENT | MCL_FUTURE);
    sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &param);
    put_text("/proc/self/oom_score_adj", "-1000");
}

struct progress *map_progress(void)
{
    int fd = open("/dev/shm/guest-progress", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(struct progress)) != 0)
        die("/dev/shm/guest-progress");
    struct progress *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared == MAP_FAILED || mlock(shared, sizeof *shared) != 0)
        die("/dev/shm/guest-progress");
    close(fd);
    return shared;
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "init") == 0)
        return init_main();
    if (strcmp(name, "hog") == 0)
        return hog_main(argc - 1, argv + 1);
    if (strcmp(name, "churn") == 0)
        return churn_main(argc - 1, argv + 1);
    if (strcmp(name, "beat") == 0)
        return beat_main(argc - 1, argv + 1);
    if (strcmp(name, "strike") == 0)
        return strike_main(argc - 1, argv + 1);
    if (strcmp(name, "reader") == 0)
        return reader_main(argc - 1, argv + 1);
    if (strcmp(name, "keep") == 0)
        return keep_main(argc - 1, argv + 1);
    fprintf(stderr, "usage: guest-tool init|hog|churn|beat|strike|reader|keep ...\n");
    return 2;
}
