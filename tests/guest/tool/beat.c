/* The watchdog: a heartbeat on the console every second, and a post mortem when the hogs stand still.
 *
 * What may wait for memory (files of /proc allocate) is read by a thread of its own, so that the heartbeat goes on
 * with old numbers, marked as such. The beat itself makes no call that allocates: sysinfo(), shared memory, and
 * writes to the serial console. */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

static struct sample {
    uint64_t taken; /* how many samples; stands still while the sampler waits */
    uint64_t swapped_in, swapped_out;
    char pressure[16]; /* PSI memory full avg10, in per cent */
} sample;

static int console, trigger;

static uint64_t number_after(const char *text, const char *name)
{
    const char *found = strstr(text, name);
    return found == NULL ? 0 : strtoull(found + strlen(name), NULL, 10);
}

static void *sampler(void *unused)
{
    static char text[16384];
    int vmstat = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
    int pressure = open("/proc/pressure/memory", O_RDONLY | O_CLOEXEC);
    for (;;) {
        ssize_t n = pread(vmstat, text, sizeof text - 1, 0);
        text[n < 0 ? 0 : n] = '\0';
        sample.swapped_in = number_after(text, "\npswpin ");
        sample.swapped_out = number_after(text, "\npswpout ");
        n = pressure < 0 ? 0 : pread(pressure, text, sizeof text - 1, 0);
        text[n < 0 ? 0 : n] = '\0';
        const char *full = strstr(text, "full avg10=");
        snprintf(sample.pressure, sizeof sample.pressure, "%.*s", full ? (int)strcspn(full + 11, " ") : 1,
                 full ? full + 11 : "-");
        __atomic_add_fetch(&sample.taken, 1, __ATOMIC_SEQ_CST);
        nanosleep(&(struct timespec){.tv_nsec = 500000000}, NULL);
    }
    return unused;
}

static void say(const char *text)
{
    if (write(console, text, strlen(text)) < 0) { /* then nobody listens */
    }
}

/* Pages that the living hogs have got through; *living says how many there are. */
static uint64_t hog_pages(const struct progress *shared, int *living)
{
    uint64_t pages = 0;
    *living = 0;
    for (size_t i = 0; i < HOGS; i++) {
        int32_t pid = __atomic_load_n(&shared->hog[i].pid, __ATOMIC_SEQ_CST);
        if (pid == 0 || (kill(pid, 0) != 0 && errno == ESRCH))
            continue;
        ++*living;
        pages += __atomic_load_n(&shared->hog[i].pages, __ATOMIC_SEQ_CST);
    }
    return pages;
}

static void post_mortem(const char *keys, bool reset)
{
    for (; *keys != '\0'; keys++)
        if (write(trigger, keys, 1) < 0)
            say("beat: no sysrq\n");
    if (reset) {
        /* The console has to get through with it first; reboot() would sync, and wait for the dead device. */
        nanosleep(&(struct timespec){.tv_sec = 3}, NULL);
        if (write(trigger, "b", 1) < 0)
            say("beat: no reset\n");
    }
}

int beat_main(int argc, char **argv)
{
    double limit = 40;
    const char *keys = "mw";
    bool reset = false;
    int option;
    while ((option = getopt(argc, argv, "n:k:b")) != -1)
        switch (option) {
        case 'n':
            limit = strtod(optarg, NULL);
            break;
        case 'k':
            keys = optarg;
            break;
        case 'b':
            reset = true;
            break;
        default:
            fprintf(stderr, "usage: guest-tool beat [-n SECONDS_OF_STALL] [-k SYSRQ_KEYS] [-b]\n");
            return 2;
        }
    const struct progress *shared = map_progress();
    console = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    trigger = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);
    pthread_t thread;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10); /* all of it will be locked */
    if (console < 0 || trigger < 0 || pthread_create(&thread, &small, sampler, NULL) != 0)
        die("beat");
    become_unswappable();
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    uint64_t last_pages = 0, last_taken = 0;
    double moved = seconds_now();
    bool hung = false;
    for (unsigned beats = 1;; beats++) {
        next.tv_sec++;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
        struct sysinfo info;
        sysinfo(&info);
        int living;
        uint64_t pages = hog_pages(shared, &living), taken = __atomic_load_n(&sample.taken, __ATOMIC_SEQ_CST);
        double now = seconds_now();
        char line[256];
        snprintf(line, sizeof line, "beat %u: free %lu kB swap-free %lu kB in %llu out %llu full %s%s hogs %d pages %llu\n",
                 beats, info.freeram / 1024 * info.mem_unit, info.freeswap / 1024 * info.mem_unit,
                 (unsigned long long)sample.swapped_in, (unsigned long long)sample.swapped_out, sample.pressure,
                 taken == last_taken ? " (old)" : "", living, (unsigned long long)pages);
        say(line);
        last_taken = taken;
        if (living == 0 || pages != last_pages) {
            if (hung)
                say("MOVES AGAIN\n");
            moved = now;
            hung = false;
        }
        last_pages = pages;
        if (now - moved > limit && !hung) {
            hung = true;
            snprintf(line, sizeof line, "HANG: no page for %.0f s\n", now - moved);
            say(line);
            post_mortem(keys, reset);
        }
    }
}
