/* A program that uses more memory than there is: fills it, touches it at random, and verifies every page.
 *
 * No two pages are the same, nor two generations of one; a page compresses about 2.5 : 1 with LZ4, like that of
 * scripts/hog.py, or as -c says: how many of its 512 words are noise. With -p it sleeps so long after each touch, as a
 * program that is mostly idle. What a page must be is a function of its index and generation. The generations are locked: they are the witness, and must not have been to the swap device. */
#include "tool.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = PAGE / 8 };

static uint64_t *memory;
static uint8_t *generations;
static size_t npages;
static uint64_t seed = 1;
static size_t noise_words = 200;
static uint64_t *counter;
static int32_t *claimed;
static uint64_t bad_pages;
static volatile sig_atomic_t enough; /* SIGUSR1: touch no more, verify and end */

static void stop_touching(int number)
{
    enough = number;
}

static void make(uint64_t *page, size_t index)
{
    static const char text[] = "a memory hog wrote this; nobody reads it but the hog... ";
    uint64_t state = mix(mix(seed + index) + generations[index]);
    page[0] = index;
    page[1] = generations[index];
    for (size_t i = 2; i < 2 + noise_words; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        page[i] = state;
    }
    for (size_t i = 2 + noise_words; i < WORDS; i++)
        memcpy(&page[i], text + i % 7 * 8, 8);
}

static void store(size_t index)
{
    generations[index]++;
    make(memory + index * WORDS, index);
    ++*counter;
}

static void verify(size_t index)
{
    uint64_t wanted[WORDS];
    const uint64_t *page = memory + index * WORDS;
    make(wanted, index);
    if (memcmp(page, wanted, PAGE) != 0 && ++bad_pages <= 10)
        printf("bad page %zu: index %llu generation %llu, wanted generation %u\n", index,
               (unsigned long long)page[0], (unsigned long long)page[1], generations[index]);
    ++*counter;
}

/* A line every second, so that a stall is seen from outside. */
static double report(const char *phase, double last)
{
    double now = seconds_now();
    if (now - last < 1)
        return last;
    printf("%s %llu\n", phase, (unsigned long long)*counter);
    return now;
}

static void claim_counter(void)
{
    struct progress *shared = map_progress();
    for (size_t i = 0; i < HOGS; i++) {
        int32_t found = __atomic_load_n(&shared->hog[i].pid, __ATOMIC_SEQ_CST);
        /* A row of a killed hog is free, too. */
        if (found != 0 && (kill(found, 0) == 0 || errno != ESRCH))
            continue;
        if (__atomic_compare_exchange_n(&shared->hog[i].pid, &found, (int32_t)getpid(), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
            counter = &shared->hog[i].pages;
            claimed = &shared->hog[i].pid;
            return;
        }
    }
    fprintf(stderr, "guest-tool: too many hogs\n");
    exit(2);
}

int hog_main(int argc, char **argv)
{
    size_t size = 0;
    double seconds = 5;
    unsigned long pause_ms = 0;
    int option;
    while ((option = getopt(argc, argv, "s:t:r:g:o:c:p:")) != -1)
        switch (option) {
        case 's':
            size = parse_size(optarg);
            break;
        case 't':
            seconds = strtod(optarg, NULL);
            break;
        case 'r':
            seed = mix(strtoul(optarg, NULL, 10));
            break;
        case 'g':
            enter_group(optarg);
            break;
        case 'o':
            put_text("/proc/self/oom_score_adj", optarg);
            break;
        case 'c':
            noise_words = strtoul(optarg, NULL, 10);
            break;
        case 'p':
            pause_ms = strtoul(optarg, NULL, 10);
            break;
        default:
            size = 0;
            argc = 0;
        }
    if (size < PAGE || noise_words > WORDS - 2) {
        fprintf(stderr, "usage: guest-tool hog -s SIZE [-t SECONDS] [-r SEED] [-g CGROUP] [-o OOM_SCORE_ADJ]"
                        " [-c NOISE_WORDS] [-p PAUSE_MS]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    npages = size / PAGE;
    generations = mmap(NULL, npages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    memory = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (generations == MAP_FAILED || memory == MAP_FAILED || mlock(generations, npages) != 0)
        die("hog");
    madvise(memory, npages * PAGE, MADV_NOHUGEPAGE); /* swap is about pages */
    claim_counter();
    signal(SIGUSR1, stop_touching);

    double begin = seconds_now(), last = begin;
    for (size_t index = 0; index < npages; index++) {
        store(index);
        if (index % 64 == 0)
            last = report("fill", last);
    }
    double filled = seconds_now(), now = filled, slowest = 0;
    uint64_t touches = 0, random = seed;
    while (now < filled + seconds && !enough) {
        random = mix(random);
        size_t index = random % npages;
        verify(index);
        store(index);
        touches++;
        double before = now;
        now = seconds_now();
        if (now - before > slowest)
            slowest = now - before;
        last = report("touch", last);
        if (pause_ms) {
            struct timespec pause = {.tv_sec = (time_t)(pause_ms / 1000), .tv_nsec = (long)(pause_ms % 1000) * 1000000};
            nanosleep(&pause, NULL);
            now = seconds_now();
        }
    }
    double touched = now;
    for (size_t index = 0; index < npages; index++) {
        verify(index);
        if (index % 64 == 0)
            last = report("verify", last);
    }
    printf("{\"pages\": %zu, \"bad_pages\": %llu, \"touches\": %llu, \"slowest_touch_ms\": %.3f, "
           "\"fill_s\": %.3f, \"touch_s\": %.3f, \"verify_s\": %.3f}\n",
           npages, (unsigned long long)bad_pages, (unsigned long long)touches, slowest * 1e3, filled - begin,
           touched - filled, seconds_now() - touched);
    __atomic_store_n(claimed, 0, __ATOMIC_SEQ_CST);
    return bad_pages != 0;
}
