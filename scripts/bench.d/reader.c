/* Reads blocks of files as a program would, and says how long each request took.
 *
 * A client in C: at 10 us a request an interpreter's own time (and, with several clients, its lock) would hide
 * what is measured. Buffers are aligned, because an unaligned megabyte is two FUSE requests.
 *
 *   reader -p PATTERN [-b BYTES] [-t THREADS] [-n REQUESTS] [-w REQUESTS] [-k SKIP] [-s SEED] [-d] < list of files
 *
 * The files (one path a line) are one row of blocks. Patterns: `sequential`; `random`, every block as likely;
 * `fresh`, no block twice before all were read, from the SKIPth on; `zipf` (exponent 0.99, popular blocks
 * scattered); `mixed`, zipf with every fourth request the next block of a scan over everything; `files`, a
 * request is to open a file, read it in blocks and close it, one after the other. -w requests come first and are
 * not counted; -n 0 is one pass. -d reads with O_DIRECT. Prints one line of JSON; errors end it with status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 64, ZIPF_PERMILLE = 990 };

struct block {
    uint32_t file;   /* index into `files` */
    uint32_t length; /* bytes that must come */
    uint64_t offset; /* in the file */
};

struct thread {
    pthread_t id;
    uint64_t random;    /* state of xorshift */
    uint8_t *buffer;    /* one block, page-aligned */
    uint64_t *taken_ns; /* of each counted request */
    uint64_t count;     /* of those */
    uint64_t bytes;     /* that they returned */
};

static struct {
    const char *pattern;
    uint64_t block_bytes, requests, warm, skip, seed;
    unsigned threads;
    int flags;
} wanted = {.pattern = "random", .block_bytes = 4096, .seed = 1, .threads = 1, .flags = O_RDONLY | O_CLOEXEC};

static char **files;
static int *descriptors;
static size_t nfiles;
static struct block *blocks;
static uint64_t nblocks;
static uint32_t *scattered;  /* a permutation of the blocks */
static double *popularity;   /* running sums of zipf weights, the last is 1 */
static atomic_ullong issued; /* requests begun in this phase */
static atomic_ullong scanned;

static void die(const char *what, const char *name)
{
    fprintf(stderr, "reader: %s %s: %s\n", what, name, strerror(errno));
    exit(1);
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (memory == NULL) {
        die("no memory for", "tables");
    }
    return memory;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * UINT64_C(2685821657736338717);
}

static bool is(const char *pattern)
{
    return strcmp(wanted.pattern, pattern) == 0;
}

static void read_list(void)
{
    char *line = NULL;
    size_t room = 0;
    ssize_t length;
    while ((length = getline(&line, &room, stdin)) > 0) {
        if (line[length - 1] == '\n') {
            line[length - 1] = '\0';
        }
        files = realloc(files, (nfiles + 1) * sizeof *files);
        if (files == NULL || (files[nfiles] = strdup(line)) == NULL) {
            die("no memory for", line);
        }
        nfiles++;
    }
    free(line);
    if (nfiles == 0) {
        errno = EINVAL;
        die("no files on", "standard input");
    }
}

static void add_block(uint32_t file, uint64_t offset, uint64_t length)
{
    static uint64_t room;
    if (nblocks == room) {
        room = room ? 2 * room : 1024;
        blocks = realloc(blocks, room * sizeof *blocks);
        if (blocks == NULL) {
            die("no memory for", "blocks");
        }
    }
    blocks[nblocks++] = (struct block){.file = file, .length = (uint32_t)length, .offset = offset};
}

/* Opens the files and cuts them into blocks; for `files` a block is a whole file and none is opened. */
static void find_blocks(void)
{
    descriptors = allocate(nfiles, sizeof *descriptors);
    for (uint32_t file = 0; file < nfiles; file++) {
        struct stat status;
        if (is("files")) {
            add_block(file, 0, 0);
            continue;
        }
        descriptors[file] = open(files[file], wanted.flags);
        if (descriptors[file] < 0 || fstat(descriptors[file], &status) != 0) {
            die("cannot open", files[file]);
        }
        uint64_t size = (uint64_t)status.st_size;
        for (uint64_t at = 0; at < size; at += wanted.block_bytes) {
            add_block(file, at, size - at < wanted.block_bytes ? size - at : wanted.block_bytes);
        }
    }
    if (nblocks == 0) {
        errno = ENODATA;
        die("nothing to read in", files[0]);
    }
}

static void prepare_choice(void)
{
    uint64_t state = UINT64_C(88172645463325252); /* the same for every run: only the requests vary */
    scattered = allocate(nblocks, sizeof *scattered);
    for (uint64_t i = 0; i < nblocks; i++) {
        scattered[i] = (uint32_t)i;
    }
    for (uint64_t i = nblocks - 1; i > 0; i--) {
        uint64_t other = next_random(&state) % (i + 1);
        uint32_t kept = scattered[i];
        scattered[i] = scattered[other];
        scattered[other] = kept;
    }
    if (is("zipf") || is("mixed")) {
        double sum = 0;
        popularity = allocate(nblocks, sizeof *popularity);
        for (uint64_t rank = 0; rank < nblocks; rank++) {
            sum += pow((double)(rank + 1), -ZIPF_PERMILLE / 1000.0);
            popularity[rank] = sum;
        }
        for (uint64_t rank = 0; rank < nblocks; rank++) {
            popularity[rank] /= sum;
        }
    }
}

static uint64_t popular(uint64_t *state)
{
    double wish = (double)(next_random(state) >> 11) / 9007199254740992.0;
    uint64_t low = 0, high = nblocks - 1;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (popularity[middle] < wish) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return scattered[low];
}

static const struct block *choose(struct thread *thread, uint64_t number)
{
    if (is("sequential") || is("files")) {
        return &blocks[(wanted.skip + number) % nblocks];
    }
    if (is("fresh")) {
        return &blocks[scattered[(wanted.skip + number) % nblocks]];
    }
    if (is("mixed") && number % 4 == 3) {
        return &blocks[atomic_fetch_add(&scanned, 1) % nblocks];
    }
    if (is("zipf") || is("mixed")) {
        return &blocks[popular(&thread->random)];
    }
    return &blocks[next_random(&thread->random) % nblocks];
}

static uint64_t read_file(struct thread *thread, const char *name)
{
    uint64_t total = 0;
    ssize_t count;
    int descriptor = open(name, wanted.flags);
    if (descriptor < 0) {
        die("cannot open", name);
    }
    while ((count = read(descriptor, thread->buffer, wanted.block_bytes)) > 0) {
        total += (uint64_t)count;
    }
    if (count < 0) {
        die("cannot read", name);
    }
    close(descriptor);
    return total;
}

static uint64_t request(struct thread *thread, const struct block *block)
{
    if (is("files")) {
        return read_file(thread, files[block->file]);
    }
    ssize_t count = pread(descriptors[block->file], thread->buffer, wanted.block_bytes, (off_t)block->offset);
    if (count < 0 || (uint64_t)count != block->length) {
        errno = count < 0 ? errno : ENODATA;
        die("cannot read", files[block->file]);
    }
    return (uint64_t)count;
}

static void *warm_up(void *of)
{
    struct thread *thread = of;
    uint64_t number;
    while ((number = atomic_fetch_add(&issued, 1)) < wanted.warm) {
        request(thread, choose(thread, number));
    }
    return NULL;
}

static void *measure(void *of)
{
    struct thread *thread = of;
    uint64_t number;
    uint64_t before = now_ns();
    while ((number = atomic_fetch_add(&issued, 1)) < wanted.requests) {
        thread->bytes += request(thread, choose(thread, wanted.warm + number));
        uint64_t after = now_ns();
        thread->taken_ns[thread->count++] = after - before;
        before = after;
    }
    return NULL;
}

/* Runs one phase in all threads; the seconds until the last one is done. */
static double run(struct thread *threads, void *(*phase)(void *))
{
    atomic_store(&issued, 0);
    uint64_t start = now_ns();
    for (unsigned i = 0; i < wanted.threads; i++) {
        if (pthread_create(&threads[i].id, NULL, phase, &threads[i]) != 0) {
            die("cannot start", "a thread");
        }
    }
    for (unsigned i = 0; i < wanted.threads; i++) {
        pthread_join(threads[i].id, NULL);
    }
    return (double)(now_ns() - start) / 1e9;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void report(const struct thread *threads, double seconds)
{
    uint64_t *all = allocate(wanted.requests, sizeof *all);
    uint64_t count = 0, bytes = 0, sum = 0;
    for (unsigned i = 0; i < wanted.threads; i++) {
        memcpy(all + count, threads[i].taken_ns, threads[i].count * sizeof *all);
        count += threads[i].count;
        bytes += threads[i].bytes;
    }
    for (uint64_t i = 0; i < count; i++) {
        sum += all[i];
    }
    qsort(all, count, sizeof *all, by_value);
    printf("{\"requests\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"mean_us\": %.3f, \"p50_us\": %.3f, "
           "\"p99_us\": %.3f}\n",
           (unsigned long long)count, (unsigned long long)bytes, seconds, (double)sum / 1e3 / (double)count,
           (double)all[count / 2] / 1e3, (double)all[count - 1 - count / 100] / 1e3);
    free(all);
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    struct thread threads[MAX_THREADS] = {0};
    int option;
    while ((option = getopt(argc, argv, "p:b:t:n:w:k:s:d")) != -1) {
        switch (option) {
        case 'p': wanted.pattern = optarg; break;
        case 'b': wanted.block_bytes = strtoull(optarg, NULL, 10); break;
        case 't': wanted.threads = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'n': wanted.requests = strtoull(optarg, NULL, 10); break;
        case 'w': wanted.warm = strtoull(optarg, NULL, 10); break;
        case 'k': wanted.skip = strtoull(optarg, NULL, 10); break;
        case 's': wanted.seed = strtoull(optarg, NULL, 10); break;
        case 'd': wanted.flags |= O_DIRECT; break;
        default: return 2;
        }
    }
    if (wanted.threads < 1 || wanted.threads > MAX_THREADS || wanted.block_bytes == 0) {
        fprintf(stderr, "reader: 1 to %d threads, and blocks of a size\n", MAX_THREADS);
        return 2;
    }
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    read_list();
    find_blocks();
    prepare_choice();
    if (wanted.requests == 0) {
        wanted.requests = nblocks;
    }
    for (unsigned i = 0; i < wanted.threads; i++) {
        threads[i].random = (wanted.seed * 1000 + i + 1) * UINT64_C(0x9E3779B97F4A7C15);
        threads[i].taken_ns = allocate(wanted.requests, sizeof *threads[i].taken_ns);
        memset(threads[i].taken_ns, 1, wanted.requests * sizeof *threads[i].taken_ns); /* no faults meanwhile */
        threads[i].buffer = mmap(NULL, wanted.block_bytes, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (threads[i].buffer == MAP_FAILED) {
            die("no memory for", "a buffer");
        }
    }
    run(threads, warm_up);
    report(threads, run(threads, measure));
    return 0;
}
