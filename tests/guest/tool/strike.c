/* Kills and stops processes at random moments, and measures how long the swap device and the hogs stand still.
 *
 * A target is NAME=FILE, where FILE holds the pid: either `"pid": N` somewhere in it, or N at its beginning. Without
 * targets it only measures. A thread reads single pages of the device past the page cache, one after the other; after
 * each strike the time is taken until a read that began after it is answered. The next strike waits for that. */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { TARGETS = 8, ANSWER_S = 120 };

static struct {
    uint64_t reads, failed;
    double began;    /* of the read under way; 0: none is */
    double slowest;  /* seconds, of all */
    double answered; /* when the first read that began after `struck` ended; 0: not yet */
    double struck;   /* when the last strike was */
} probe;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int device;
static volatile sig_atomic_t ended;

static void rest(double seconds)
{
    nanosleep(&(struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)},
              NULL);
}

static void *read_pages(void *buffer)
{
    off_t npages = lseek(device, 0, SEEK_END) / PAGE;
    for (uint64_t random = 1;; random = mix(random)) {
        double began = seconds_now();
        pthread_mutex_lock(&lock);
        probe.began = began;
        pthread_mutex_unlock(&lock);
        ssize_t n = pread(device, buffer, PAGE, (off_t)(random % (uint64_t)npages) * PAGE);
        double now = seconds_now();
        pthread_mutex_lock(&lock);
        probe.began = 0;
        probe.reads++;
        probe.failed += n != PAGE;
        if (now - began > probe.slowest)
            probe.slowest = now - began;
        if (probe.answered == 0 && began >= probe.struck)
            probe.answered = now;
        pthread_mutex_unlock(&lock);
        rest(0.01);
    }
    return NULL;
}

/* The pid in the file of a target; 0 if there is none. */
static pid_t pid_of(const char *path)
{
    char text[4096];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n < 0 ? 0 : n] = '\0';
    const char *found = strstr(text, "\"pid\": ");
    return (pid_t)strtol(found == NULL ? text : found + 7, NULL, 10);
}

static bool alive(pid_t pid)
{
    return pid > 1 && kill(pid, 0) == 0;
}

static uint64_t hog_pages(const struct progress *shared)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < HOGS; i++)
        if (shared->hog[i].pid != 0)
            pages += __atomic_load_n(&shared->hog[i].pages, __ATOMIC_SEQ_CST);
    return pages;
}

/* How long the hogs have stood still at most, while `until` is in the future or the device has not answered. */
static double watch(const struct progress *shared, double until, double last_moment)
{
    double moved = seconds_now(), longest = 0;
    uint64_t pages = hog_pages(shared);
    for (;;) {
        rest(0.005);
        double now = seconds_now();
        uint64_t found = hog_pages(shared);
        if (now - moved > longest)
            longest = now - moved;
        if (found != pages)
            moved = now;
        pages = found;
        pthread_mutex_lock(&lock);
        bool answered = probe.answered != 0;
        pthread_mutex_unlock(&lock);
        if (ended || now > last_moment || (now > until && answered))
            return longest;
    }
}

static void end(int number)
{
    (void)number;
    ended = 1;
}

int strike_main(int argc, char **argv)
{
    const char *path = NULL, *names[TARGETS] = {NULL}, *files[TARGETS] = {NULL};
    double seconds = 60, least = 1, most = 2;
    uint64_t random = 1, strikes = UINT64_MAX, stops = 25;
    int option;
    while ((option = getopt(argc, argv, "d:t:r:n:i:a:p:")) != -1)
        switch (option) {
        case 'd':
            path = optarg;
            break;
        case 't':
            seconds = strtod(optarg, NULL);
            break;
        case 'r':
            random = mix(strtoul(optarg, NULL, 10));
            break;
        case 'n':
            strikes = strtoul(optarg, NULL, 10);
            break;
        case 'i':
            least = strtod(optarg, NULL);
            break;
        case 'a':
            most = strtod(optarg, NULL);
            break;
        case 'p':
            stops = strtoul(optarg, NULL, 10);
            break;
        default:
            path = NULL;
            argc = 0;
        }
    size_t targets = 0;
    for (int i = optind; i < argc && targets < TARGETS; i++) {
        char *separator = strchr(argv[i], '=');
        if (separator == NULL)
            die(argv[i]);
        *separator = '\0';
        names[targets] = argv[i];
        files[targets++] = separator + 1;
    }
    if (path == NULL) {
        fprintf(stderr, "usage: guest-tool strike -d DEVICE [-t SECONDS] [-r SEED] [-n STRIKES] [-i LEAST_S] [-a MOST_S]"
                        " [-p PER_CENT_OF_STOPS] [NAME=FILE...]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    const struct progress *shared = map_progress();
    void *buffer = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    device = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    pthread_t thread;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    if (device < 0 || buffer == MAP_FAILED || pthread_create(&thread, &small, read_pages, buffer) != 0)
        die(path);
    become_unswappable();
    signal(SIGTERM, end);

    double begin = seconds_now(), finish = begin + seconds, still = 0;
    if (targets == 0)
        still = watch(shared, finish, finish);
    for (uint64_t i = 0, done = 0; targets > 0 && done < strikes && !ended && seconds_now() < finish; i++) {
        random = mix(random);
        double pause = least + (most - least) * (double)(random % 1000) / 1000;
        rest(pause);
        random = mix(random);
        size_t which = random % targets;
        pid_t pid = pid_of(files[which]);
        int number = random / 16 % 100 < stops ? SIGSTOP : SIGKILL;
        double stopped = 0.1 + 0.9 * (double)(random / 4096 % 1000) / 1000;
        if (!alive(pid))
            continue;
        size_t servers = 0;
        for (size_t j = 0; j < targets; j++)
            servers += (strcmp(names[j], "server") == 0 || strcmp(names[j], "standby") == 0) && alive(pid_of(files[j]));
        double struck = seconds_now();
        pthread_mutex_lock(&lock);
        probe.struck = struck;
        probe.answered = 0;
        pthread_mutex_unlock(&lock);
        if (kill(pid, number) != 0)
            continue;
        double longest = 0;
        if (number == SIGSTOP) {
            longest = watch(shared, struck + stopped, struck + stopped);
            kill(pid, SIGCONT);
        }
        double rest_longest = watch(shared, seconds_now() + least, struck + ANSWER_S);
        longest = rest_longest > longest ? rest_longest : longest;
        still = longest > still ? longest : still;
        pthread_mutex_lock(&lock);
        double answered = probe.answered;
        pthread_mutex_unlock(&lock);
        printf("{\"at_s\": %.3f, \"target\": \"%s\", \"signal\": %d, \"servers\": %zu, \"answered_ms\": %.1f, "
               "\"hog_still_ms\": %.1f}\n",
               struck - begin, names[which], number, servers, answered == 0 ? -1 : (answered - struck) * 1e3,
               longest * 1e3);
        done++;
    }
    pthread_mutex_lock(&lock);
    printf("{\"probes\": %llu, \"failed_probes\": %llu, \"slowest_probe_ms\": %.1f, \"hog_still_ms\": %.1f}\n",
           (unsigned long long)probe.reads, (unsigned long long)probe.failed,
           (probe.began != 0 && seconds_now() - probe.began > probe.slowest ? seconds_now() - probe.began : probe.slowest) *
               1e3,
           still * 1e3);
    fflush(stdout);
    _exit(0); /* the thread may be inside a read that does not end */
}
