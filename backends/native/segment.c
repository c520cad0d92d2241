/* The segment file: geometry, creation, attachment, destruction.
 *
 * A segment is built under another name and linked to its own when it is whole, so nobody ever attaches half of
 * one. What attach checks is the part of the superblock that never changes, under a checksum. */
#include "tm.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char MAGIC[8] = {'t', 'm', 'e', 'm', 's', 'e', 'g', '\n'};
#define ABI ((uint32_t)(sizeof(struct tm_lock) << 16 | sizeof(struct tm_thread)))
#define MEMORY_MAX (UINT64_C(512) << 30) /* 32-bit references in units of 128 bytes */

static _Atomic uint32_t next_id = 1;

static uint64_t align(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static uint64_t take(uint64_t *end, uint64_t bytes)
{
    uint64_t start = align(*end, 64);
    *end = start + bytes;
    return start;
}

/* Fill in everything of `s` that does not change. False if memory_bytes is too small to hold anything. */
static bool geometry(struct tm_super *s, uint64_t memory_bytes)
{
    uint64_t n = memory_bytes / TM_CHUNK; /* first guess, without the tables */
    uint64_t end = 0;
    memset(s, 0, sizeof *s);
    memcpy(s->magic, MAGIC, sizeof MAGIC);
    s->version = TM_VERSION;
    s->abi = ABI;
    s->memory_bytes = memory_bytes;
    s->nbuckets = 1024;
    while ((uint64_t)s->nbuckets * 8192 < memory_bytes)
        s->nbuckets *= 2;
    take(&end, sizeof *s);
    s->off_clients = take(&end, sizeof(struct tm_client) * TM_NACCOUNTS);
    s->off_pools = take(&end, sizeof(struct tm_pool) * TM_MAX_POOLS);
    s->off_threads = take(&end, sizeof(struct tm_thread) * TM_MAX_THREADS);
    s->off_bins = take(&end, sizeof(struct tm_bin) * TM_NBINS);
    s->off_buckets = take(&end, sizeof(uint32_t) * s->nbuckets);
    s->off_states = take(&end, n);
    s->off_descs = take(&end, sizeof(struct tm_chunk) * n);
    s->off_touched = take(&end, sizeof(struct tm_touched) * n);
    s->off_times = take(&end, sizeof(struct tm_times) * TM_MAX_CLIENTS);
    s->off_data = align(end, TM_CHUNK);
    if (s->off_data + 32 * TM_CHUNK > memory_bytes)
        return false;
    s->nchunks = (uint32_t)((memory_bytes - s->off_data) / TM_CHUNK);
    s->file_bytes = s->off_data + (uint64_t)s->nchunks * TM_CHUNK;
    return true;
}

static uint64_t checksum(const struct tm_super *s)
{
    return XXH3_64bits(s, offsetof(struct tm_super, checksum));
}

static struct tm_segment *map(int fd, const char *path, const struct tm_super *s)
{
    struct tm_segment *seg = calloc(1, sizeof *seg);
    void *base = MAP_FAILED;
    if (seg && (seg->path = strdup(path)))
        base = mmap(NULL, s->file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        if (seg)
            free(seg->path);
        free(seg);
        return NULL;
    }
    seg->base = base;
    seg->size = s->file_bytes;
    seg->fd = fd;
    seg->super = base;
    seg->clients = at(seg, s->off_clients);
    seg->pools = at(seg, s->off_pools);
    seg->threads = at(seg, s->off_threads);
    seg->bins = at(seg, s->off_bins);
    seg->buckets = at(seg, s->off_buckets);
    seg->states = at(seg, s->off_states);
    seg->chunks = at(seg, s->off_descs);
    seg->touched = at(seg, s->off_touched);
    seg->times = at(seg, s->off_times);
    seg->data_offset = s->off_data;
    seg->nchunks = s->nchunks;
    seg->id = atomic_fetch_add(&next_id, 1);
    return seg;
}

/* Locks and lists of a fresh, zeroed file. */
static void initialise(struct tm_segment *seg)
{
    lock_init(&seg->super->control);
    lock_init(&seg->super->chunk_lock);
    lock_init(&seg->super->twin_lock);
    for (unsigned i = 0; i < TM_NSHARDS; i++)
        lock_init(&seg->super->shards[i]);
    for (unsigned i = 0; i < TM_MAX_THREADS; i++)
        lock_init(&seg->threads[i].life);
    for (uint32_t bin = 0; bin < BIN_EPHEMERAL; bin++)
        bin_ready(seg, bin);
    seg->super->limit = seg->super->persistent_limit = seg->nchunks;
    seg->super->size_least = seg->super->size_most = seg->nchunks;
    atomic_store(&seg->super->condense_percent, 5);
    atomic_store(&seg->super->alive, 1);
}

int tm_create(const char *path, uint64_t memory_bytes, struct tm_segment **out)
{
    struct tm_super s;
    struct timespec now;
    char *temporary = NULL;
    int fd = -1, rc = 0;

    *out = NULL;
    if (memory_bytes > MEMORY_MAX)
        return SEG_TOO_LARGE;
    if (!geometry(&s, memory_bytes))
        return SEG_TOO_SMALL;
    clock_gettime(CLOCK_REALTIME, &now);
    s.nonce = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec + ((uint64_t)getpid() << 48);
    s.checksum = checksum(&s);
    if (asprintf(&temporary, "%s.new.%ld", path, (long)getpid()) < 0)
        return -ENOMEM;
    unlink(temporary); /* left by a former process of this number */
    fd = open(temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)s.file_bytes)
        || (rc = posix_fallocate(fd, 0, (off_t)s.off_data)) /* never a SIGBUS in the tables */
        || pwrite(fd, &s, sizeof s, 0) != (ssize_t)sizeof s || !(*out = map(fd, path, &s))) {
        rc = rc ? -rc : -errno;
        goto done;
    }
    initialise(*out);
    if (link(temporary, path))
        rc = -errno;
done:
    if (fd >= 0)
        unlink(temporary);
    if (rc && *out) {
        tm_close(*out);
        *out = NULL;
    } else if (rc && fd >= 0) {
        close(fd);
    }
    free(temporary);
    return rc;
}

int tm_attach(const char *path, struct tm_segment **out)
{
    struct tm_super s, want;
    struct stat st;
    int rc = 0, fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);

    *out = NULL;
    if (fd < 0)
        return -errno;
    if (fstat(fd, &st))
        rc = -errno;
    else if (!S_ISREG(st.st_mode) || st.st_size < (off_t)sizeof s
             || pread(fd, &s, sizeof s, 0) != (ssize_t)sizeof s || memcmp(s.magic, MAGIC, sizeof MAGIC))
        rc = SEG_FOREIGN;
    else if (s.version != TM_VERSION)
        rc = SEG_VERSION;
    else if (s.abi != ABI)
        rc = SEG_ABI;
    else if (s.checksum != checksum(&s) || !geometry(&want, s.memory_bytes)
             || memcmp(&s.file_bytes, &want.file_bytes, sizeof s.file_bytes) || s.off_data != want.off_data
             || s.nchunks != want.nchunks)
        rc = SEG_DAMAGED;
    else if ((uint64_t)st.st_size < s.file_bytes)
        rc = SEG_SHORT;
    else if (!atomic_load(&s.alive))
        rc = -ENOENT; /* destroyed this moment */
    else if (!(*out = map(fd, path, &s)))
        rc = -errno;
    if (rc)
        close(fd);
    return rc;
}

int tm_destroy(const char *path)
{
    struct tm_segment *seg;
    int rc = tm_attach(path, &seg);
    if (rc)
        return rc;
    atomic_store(&seg->super->alive, 0);
    rc = unlink(path) ? -errno : 0;
    struct tm_ctx *ctx = rc ? NULL : ctx_get(seg);
    /* Memory goes back now even while others still map it, but only after their last operation: a page that is
     * read after the punch would be allocated again, for as long as they map it. */
    if (ctx && grace(ctx, 5000))
        (void)fallocate(seg->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)seg->data_offset,
                        (off_t)(seg->size - seg->data_offset));
    tm_close(seg);
    return rc;
}

void tm_close(struct tm_segment *seg)
{
    ctx_release(seg);
    atomic_store(&seg->closed, 1);
    /* Another thread's record lives in the mapping, and the kernel walks its robust list when it ends: then the
     * mapping stays until the process does. */
    if (atomic_load(&seg->users) == 0) {
        munmap(seg->base, seg->size);
        close(seg->fd);
        free(seg->path);
        free(seg->vain);
        twins_free(seg);
        packs_free(seg);
        codec_close(seg);
        free(seg);
    }
}
