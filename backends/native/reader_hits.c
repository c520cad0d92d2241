#include "reader_hits.h"

#include "reader_passing.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>

enum { MISS_PAGES = 16 }; /* to compress this much takes some 80 us; more is for a thread of Python's */

/* A lock whose writers do not wait for ever although there is a reader at any time. */
static void fair_lock_init(pthread_rwlock_t *lock)
{
    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(lock, &attr);
    pthread_rwlockattr_destroy(&attr);
}

int hits_init(struct hits *h, int device, size_t largest)
{
    h->device = device;
    h->largest = largest;
    fair_lock_init(&h->pool_lock);
    return files_init(&h->files);
}

void hits_free(struct hits *h)
{
    files_free(&h->files);
    pthread_rwlock_destroy(&h->pool_lock);
}

void hits_use(struct hits *h, const struct tm_handle *pool)
{
    pthread_rwlock_wrlock(&h->pool_lock);
    h->has_pool = pool != NULL;
    if (pool)
        h->pool = *pool;
    pthread_rwlock_unlock(&h->pool_lock);
}

static void add(_Atomic uint64_t *counter, uint64_t n) { atomic_fetch_add_explicit(counter, n, memory_order_relaxed); }

static int64_t fetch(struct hits *h, const struct target *t, uint32_t first, uint8_t *data, uint32_t npages)
{
    int64_t found = TM_MISS;
    pthread_rwlock_rdlock(&h->pool_lock);
    if (h->has_pool)
        found = tm_get(&h->pool, t->oid, first, data, npages);
    pthread_rwlock_unlock(&h->pool_lock);
    return found;
}

/* Whether a put now is not refused as such: a refused one would drop what is there. The lock of the pool is held. */
static bool pool_takes(const struct hits *h)
{
    return h->has_pool && !mode_of(h->pool.seg, payer_of(h->pool.seg, h->pool.pool));
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Put what was read in the turn of `m`, if nothing was said to the gate since. */
static void put(struct hits *h, const struct missed *m, uint32_t first, const uint8_t *data, uint32_t npages)
{
    struct gate *g = m->gate;
    int64_t stored = 0;
    bool overtaken = true;
    pthread_mutex_lock(&g->put_lock);
    if (g->turn == m->turn || MUTANT(9)) {
        KP(95);
        overtaken = false;
        if (first + npages > g->top && !MUTANT(10))
            g->top = first + npages;
        pthread_rwlock_rdlock(&h->pool_lock);
        if (pool_takes(h))
            stored = tm_put(&h->pool, m->target.oid, first, data, npages, KEEP_NOTHING);
        pthread_rwlock_unlock(&h->pool_lock);
    }
    pthread_mutex_unlock(&g->put_lock);
    stored = stored < 0 ? 0 : stored;
    add(&h->put_pages, (uint64_t)stored);
    add(overtaken ? &h->overtaken_pages : &h->refused_pages, npages - (uint64_t)stored);
    if (stored == npages)
        (void)posix_fadvise(m->target.fd, (off_t)first * TM_PAGE, (off_t)npages * TM_PAGE, POSIX_FADV_DONTNEED);
}

/* Fill `data` with the missing pages, and put them. Whole pages only: where a file ends is asked in Python. */
static bool fill(struct hits *h, uint64_t fh, uint32_t first, uint8_t *data, uint32_t npages)
{
    uint64_t start = (uint64_t)first * TM_PAGE, bytes = (uint64_t)npages * TM_PAGE;
    struct iovec part = {data, bytes};
    struct missed m;
    pthread_rwlock_rdlock(&h->pool_lock);
    bool takes = pool_takes(h);
    pthread_rwlock_unlock(&h->pool_lock);
    if (!takes || !files_missed(&h->files, fh, start, start + bytes, &m))
        return false;
    bool filled = false;
    if (npages <= MISS_PAGES && start + bytes <= m.target.size) {
        uint64_t begun = now_ns();
        KP(96);
        filled = preadv2(m.target.fd, &part, 1, (off_t)start, RWF_NOWAIT) == (ssize_t)bytes;
        uint64_t read_by = now_ns();
        KP(97);
        if (filled) {
            put(h, &m, first, data, npages);
            add(&h->lower_ns, read_by - begun);
            add(&h->put_ns, now_ns() - read_by);
            add(&h->miss_reads, 1);
            add(&h->miss_pages, npages);
        }
    }
    gate_drop(m.gate);
    return filled;
}

bool hits_answer(struct hits *h, const struct fuse_in_header *in, const struct fuse_read_in *read_in, uint8_t *data,
                 bool may_wait)
{
    uint64_t offset = read_in->offset, end = offset + read_in->size;
    struct target t;
    struct stat st;
    if (read_in->size > h->largest || end < offset || end > (UINT64_C(1) << 32) * TM_PAGE
        || !files_find(&h->files, read_in->fh, end, &t))
        return false;
    if (end > t.size) { /* whatever reaches the end asks where that is now */
        if (!may_wait || fstat(t.fd, &st) || (uint64_t)st.st_size != t.size)
            return false;
        end = t.size;
    }
    if (end <= offset) {
        reply_bytes(h->device, in->unique, NULL, 0);
        return true;
    }
    uint64_t first = offset / TM_PAGE, npages = (end + TM_PAGE - 1) / TM_PAGE - first;
    int64_t found = fetch(h, &t, (uint32_t)first, data, (uint32_t)npages);
    if (found < 0)
        return false;
    if (found < (int64_t)npages) {
        uint32_t have = (uint32_t)found;
        if (!fill(h, read_in->fh, (uint32_t)first + have, data + have * TM_PAGE, (uint32_t)npages - have))
            return false;
    } else {
        add(&h->reads, 1);
        add(&h->bytes, end - offset);
    }
    add(&h->pages, (uint64_t)found);
    reply_bytes(h->device, in->unique, data + offset % TM_PAGE, end - offset);
    return true;
}
