/* Reads files through a mount at random and verifies every block, over and over.
 *
 * The files are written into the lower directory first. What a block must be is a function of its file and place. A
 * daemon that is killed takes its mount with it: with -e such errors are counted, and the file is opened again.
 * SIGTERM ends it before its time, with its figures. */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 65536, FILES = 64 };

static uint64_t *block, *wanted;
static int descriptors[FILES];
static volatile sig_atomic_t ended;

static void end(int number)
{
    (void)number;
    ended = 1;
}

static void fill(uint64_t *to, size_t file, size_t at)
{
    for (size_t i = 0; i < BLOCK / 8; i++)
        to[i] = i % 2 ? file : mix((file << 32) + at + i);
}

static void name_of(char *to, size_t size, const char *directory, size_t file)
{
    snprintf(to, size, "%s/file-%zu", directory, file);
}

static void write_file(const char *directory, size_t file, size_t size)
{
    char path[512];
    name_of(path, sizeof path, directory, file);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        die(path);
    for (size_t at = 0; at < size; at += BLOCK) {
        fill(block, file, at);
        if (write(fd, block, BLOCK) != BLOCK)
            die(path);
    }
    /* What is dirty cannot be cached by others, and is no load of ours later. */
    if (fsync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0)
        die(path);
    close(fd);
}

/* Read one block; whether it was there. errno says why not. */
static bool read_block(const char *directory, size_t file, size_t at)
{
    if (descriptors[file] < 0) {
        char path[512];
        name_of(path, sizeof path, directory, file);
        descriptors[file] = open(path, O_RDONLY | O_CLOEXEC);
        if (descriptors[file] < 0)
            return false;
    }
    ssize_t n = pread(descriptors[file], block, BLOCK, (off_t)at);
    if (n == BLOCK)
        return true;
    if (n >= 0)
        errno = ENODATA;
    int reason = errno;
    close(descriptors[file]);
    descriptors[file] = -1;
    errno = reason;
    return false;
}

int reader_main(int argc, char **argv)
{
    size_t size = 48 << 20, files = 8;
    double seconds = 10, pause = 0.01;
    uint64_t random = 1;
    bool forgiving = false;
    int option;
    while ((option = getopt(argc, argv, "s:n:t:r:p:e")) != -1)
        switch (option) {
        case 's':
            size = parse_size(optarg);
            break;
        case 'n':
            files = strtoul(optarg, NULL, 10);
            break;
        case 't':
            seconds = strtod(optarg, NULL);
            break;
        case 'r':
            random = mix(strtoul(optarg, NULL, 10));
            break;
        case 'p':
            pause = strtod(optarg, NULL) / 1e3;
            break;
        case 'e':
            forgiving = true;
            break;
        default:
            files = 0;
        }
    const char *lower = argv[optind], *upper = lower == NULL ? NULL : argv[optind + 1];
    size_t each = files == 0 ? 0 : size / files / BLOCK * BLOCK;
    if (upper == NULL || files > FILES || each == 0) {
        fprintf(stderr, "usage: guest-tool reader [-s SIZE] [-n FILES] [-t SECONDS] [-r SEED] [-p PAUSE_MS] [-e] LOWER MOUNT\n");
        return 2;
    }
    block = malloc(BLOCK);
    wanted = malloc(BLOCK);
    if (block == NULL || wanted == NULL)
        die("reader");
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t file = 0; file < files; file++) {
        write_file(lower, file, each);
        descriptors[file] = -1;
    }
    uint64_t reads = 0, errors = 0, bad = 0;
    double begin = seconds_now(), now = begin, last = begin, slowest = 0, lately = 0;
    signal(SIGTERM, end);
    printf("reading\n");
    while (!ended && now < begin + seconds) {
        random = mix(random);
        size_t file = random % files, at = random / 64 % (each / BLOCK) * BLOCK;
        if (read_block(upper, file, at)) {
            fill(wanted, file, at);
            bad += memcmp(block, wanted, BLOCK) != 0;
            reads++;
        } else if (forgiving && (errno == ENOTCONN || errno == ECONNABORTED || errno == ENOENT || errno == EIO ||
                                 errno == ENODATA)) {
            /* ENOENT: nothing is mounted there just now; ENODATA: a part of the block was cached when it went */
            errors++;
            nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        } else if (errno != EINTR) {
            die("reader: read");
        }
        double before = now;
        now = seconds_now();
        lately = now - before > lately ? now - before : lately;
        slowest = lately > slowest ? lately : slowest;
        if (now - last >= 1) {
            printf("read %llu slowest %.1f\n", (unsigned long long)reads, lately * 1e3);
            last = now;
            lately = 0;
        }
        /* Below a second; without a pause it would take a CPU for itself. */
        nanosleep(&(struct timespec){.tv_nsec = (long)(pause * 1e9) % 1000000000}, NULL);
        now = seconds_now();
    }
    printf("{\"reads\": %llu, \"bad_reads\": %llu, \"failed_reads\": %llu, \"slowest_read_ms\": %.1f}\n",
           (unsigned long long)reads, (unsigned long long)bad, (unsigned long long)errors, slowest * 1e3);
    return bad != 0;
}
