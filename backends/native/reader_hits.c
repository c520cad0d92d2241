#include "reader_hits.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#ifndef RWF_DONTCACHE
#define RWF_DONTCACHE 0x80
#endif

enum { SYS_CACHESTAT = 451 }; /* of all machines; of headers that are new enough */
enum {
    MISS_PAGES = 16,   /* to compress this much takes some 80 us; more is for who may wait */
    LACKED_BEFORE = 3, /* misses; then the next is read past the kernel's cache, as it is known not to be there: that opens the file once more */
};

/* Up to where files are cached, as in `fs/files.py`: what is counted in pages, up to where a file was put among it, has 32 bits. */
#define MOST_BYTES ((UINT64_C(1) << 32) * TM_PAGE - (MUTANT(90) ? 0 : TM_PAGE))

/* A lock whose writers do not wait for ever although there is a reader at any time. */
static void fair_lock_init(pthread_rwlock_t *lock)
{
    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(lock, &attr);
    pthread_rwlockattr_destroy(&attr);
}

/* From Linux 6.16 on: 6.14 has RWF_DONTCACHE, but may drop a page that is being written back. */
static bool reads_past_cache(void)
{
    struct utsname name;
    unsigned major, minor;
    return !uname(&name) && sscanf(name.release, "%u.%u", &major, &minor) == 2 && (major > 6 || (major == 6 && minor >= 16));
}

int hits_init(struct hits *h, size_t largest)
{
    atomic_init(&h->leaves_copies, !reads_past_cache());
    atomic_init(&h->doubts, false);
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

bool hits_flush(struct hits *h, const uint8_t *oid)
{
    pthread_rwlock_rdlock(&h->pool_lock);
    bool done = h->has_pool && tm_flush_object(&h->pool, oid) >= 0;
    pthread_rwlock_unlock(&h->pool_lock);
    return done;
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

/* Put what was read in the turn of `m`, if nothing was said to the gate since; how many pages. */
static int64_t put_some(struct hits *h, const struct missed *m, uint32_t first, const uint8_t *data, uint32_t npages)
{
    struct gate *g = m->gate;
    int64_t stored = 0;
    bool overtaken = true;
    pthread_mutex_lock(&g->put_lock);
    if (g->turn == m->target.turn || MUTANT(9)) {
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
    return stored;
}

/* In pieces, so that a change does not wait for long. The kernel's copy, if there may be one, goes if the pool has all. */
void hits_put(struct hits *h, struct answer *a)
{
    const struct missed *m = &a->unput.missed;
    if (!m->gate)
        return;
    uint64_t begun = timing_now();
    uint32_t stored = 0, first = a->unput.first, npages = a->unput.npages;
    for (uint32_t done = 0, n; done < npages; done += n) {
        n = npages - done < MISS_PAGES ? npages - done : MISS_PAGES;
        stored += (uint32_t)put_some(h, m, first + done, a->unput.pages + (size_t)done * TM_PAGE, n);
    }
    if (a->unput.copied && stored == npages)
        (void)posix_fadvise(m->target.fd, (off_t)first * TM_PAGE, (off_t)npages * TM_PAGE, POSIX_FADV_DONTNEED);
    add(&h->put_ns, timing_now() - begun);
    gate_drop(m->gate);
    a->unput.missed.gate = NULL;
}

/* How many of the bytes at `start` could be read. */
static uint64_t read_lower(struct hits *h, int fd, uint64_t start, uint8_t *data, uint64_t bytes, bool waits)
{
    uint64_t done = 0;
    ssize_t n;
    /* The kernel would read ahead, what would stay there if nobody came for it. Python switches it on for reads past
     * the pool. */
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    do {
        struct iovec part = {data + done, bytes - done};
        int past = atomic_load_explicit(&h->leaves_copies, memory_order_relaxed) ? 0 : RWF_DONTCACHE;
        n = preadv2(fd, &part, 1, (off_t)(start + done), past | (waits ? 0 : RWF_NOWAIT));
        if (n < 0 && past && errno == EOPNOTSUPP) {
            atomic_store(&h->leaves_copies, true);
            n = preadv2(fd, &part, 1, (off_t)(start + done), waits ? 0 : RWF_NOWAIT);
        }
        done += n > 0 ? (uint64_t)n : 0;
    } while (waits && n > 0 && done < bytes);
    return done;
}

/* Whether a file's pages are its descriptor's own: of a layer above another file system they are that one's. */
static bool has_own_pages(int fd)
{
    struct statfs system;
    if (fstatfs(fd, &system))
        return false;
    return system.f_type == EXT4_SUPER_MAGIC || system.f_type == XFS_SUPER_MAGIC || system.f_type == BTRFS_SUPER_MAGIC;
}

/* Whether the kernel may have these pages, or be about to: to try costs 10 to 50 us if it has not, for it begins to read them. */
static bool may_have(int fd, uint64_t start, uint32_t npages)
{
    struct {
        uint64_t offset, length;
    } range = {start, (uint64_t)npages * TM_PAGE};
    struct {
        uint64_t cached, others[4];
    } found;
    if (!has_own_pages(fd) || syscall(SYS_CACHESTAT, fd, &range, &found, 0)) /* since 6.5, and not for anybody */
        return true;
    return found.cached == npages && !MUTANT(76);
}

/* The same, past the kernel's cache: 7 us less a page, of some 40 on a disk in memory, than to have a page in there and drop it. */
static uint64_t read_past_cache(struct hits *h, uint64_t fh, uint64_t start, uint8_t *data, uint64_t bytes)
{
    int fd = files_past_cache(&h->files, fh);
    ssize_t n = fd < 0 ? -1 : pread(fd, data, bytes, (off_t)start);
    return n < 0 ? 0 : (uint64_t)n;
}

static bool begins(struct wait *w, uint64_t now_ns)
{
    if (!w)
        return false;
    w->begun_ns = now_ns;
    return MUTANT(65) || (w->begun = w->begin(w->with));
}

/* Fill `data` with the missing pages, which are to be put. The last one must end where the file does: else it is for Python. */
static enum found fill(struct hits *h, uint64_t fh, const struct target *t, uint32_t first, uint8_t *data, uint32_t npages,
                       bool waits, struct wait *wait, struct answer *out)
{
    uint64_t start = (uint64_t)first * TM_PAGE, bytes = (uint64_t)npages * TM_PAGE;
    struct missed m;
    pthread_rwlock_rdlock(&h->pool_lock);
    bool takes = pool_takes(h);
    pthread_rwlock_unlock(&h->pool_lock);
    if (!takes || !files_missed(&h->files, fh, start, start + bytes, waits, &m))
        return FOUND_NOT;
    enum found result = FOUND_NOT;
    if (m.target.size == t->size && !memcmp(m.target.oid, t->oid, TM_OID)) {
        uint64_t there = t->size - start < bytes ? t->size - start : bytes, count = 0;
        uint64_t begun = timing_now();
        bool past = false;
        KP(96);
        if (!waits && npages <= MISS_PAGES) {
            bool tries = m.tries && (!m.lacked || may_have(t->fd, start, npages)), told = m.tries && !tries;
            if (tries)
                count = read_lower(h, t->fd, start, data, bytes, false);
            m.cold = files_had(&h->files, fh, tries, count) || (told && m.lacked >= LACKED_BEFORE);
        }
        if (!waits && count != there)
            waits = begins(wait, begun);
        if (waits && m.cold && t->local && npages <= MISS_PAGES) {
            count = read_past_cache(h, fh, start, data, bytes);
            past = count == there; /* else it is read as if that had not been tried */
        }
        if (waits && count != there)
            count = read_lower(h, t->fd, start, data, bytes, true);
        uint64_t read_by = timing_now();
        if (wait)
            wait->ended_ns = read_by;
        KP(97);
        if (count == there) {
            memset(data + there, 0, bytes - there);
            out->unput.missed = m;
            out->unput.first = first;
            out->unput.npages = npages;
            out->unput.pages = data;
            /* One page that was waited for leaves no copy. */
            out->unput.copied = !past && (!waits || npages > 1 || atomic_load(&h->leaves_copies));
            if (t->unnoted)
                files_noted(&h->files, fh);
            add(&h->lower_ns, read_by - begun);
            add(&h->miss_reads, 1);
            add(&h->miss_pages, npages);
            return FOUND;
        } else if (!waits) {
            result = FOUND_IF_WAITING;
        }
    }
    gate_drop(m.gate);
    return result;
}

/* Whether a file is still as it was when its pages were valid. Who has it open has its inode in memory, so that takes no waiting. */
static bool is_unchanged(struct hits *h, uint64_t fh, const struct target *t)
{
    struct stat st;
    return !t->local || (!fstat(t->fd, &st) && files_show(&h->files, fh, &st));
}

static enum found find(struct hits *h, const struct fuse_read_in *read_in, uint8_t *data, bool waits, struct wait *wait,
                       struct answer *out)
{
    uint64_t offset = read_in->offset, end = offset + read_in->size;
    struct target t;
    struct stat st;
    if (read_in->size > h->largest || end < offset || end > MOST_BYTES
        || !files_find(&h->files, read_in->fh, offset, end, &t))
        return FOUND_NOT;
    if (atomic_load(&h->doubts) && !is_unchanged(h, read_in->fh, &t))
        return FOUND_NOT;
    if (end > t.size) { /* whatever reaches the end asks where that is now */
        if (!waits && !t.local && !(waits = begins(wait, timing_now())))
            return FOUND_IF_WAITING;
        if (fstat(t.fd, &st) || (uint64_t)st.st_size != t.size)
            return FOUND_NOT;
        end = t.size;
    }
    *out = (struct answer){0};
    if (end <= offset)
        return FOUND;
    uint64_t first = offset / TM_PAGE, npages = (end + TM_PAGE - 1) / TM_PAGE - first;
    int64_t found = fetch(h, &t, (uint32_t)first, data, (uint32_t)npages);
    if (found < 0)
        return FOUND_NOT;
    if (found < (int64_t)npages) {
        uint32_t have = (uint32_t)found;
        enum found rest = fill(h, read_in->fh, &t, (uint32_t)first + have, data + (size_t)have * TM_PAGE,
                               (uint32_t)npages - have, waits, wait, out);
        if (rest != FOUND)
            return rest;
    } else if (t.unnoted) { /* once */
        files_noted(&h->files, read_in->fh);
        return FOUND_NOT;
    } else {
        add(&h->reads, 1);
        add(&h->bytes, end - offset);
    }
    add(&h->pages, (uint64_t)found);
    out->bytes = data + offset % TM_PAGE;
    out->length = end - offset;
    return FOUND;
}

enum found hits_find(struct hits *h, const struct fuse_read_in *read_in, uint8_t *data, bool waits, struct answer *out)
{
    return find(h, read_in, data, waits, NULL, out);
}

enum found hits_find_or_wait(struct hits *h, const struct fuse_read_in *read_in, uint8_t *data, struct wait *wait,
                             struct answer *out)
{
    return find(h, read_in, data, false, wait, out);
}

bool hits_expect(struct hits *h, uint64_t fh, uint64_t offset, uint32_t size, struct target *out)
{
    uint64_t end = offset + size;
    return size <= h->largest && end <= MOST_BYTES && files_expect(&h->files, fh, offset, end, false, out)
           && end <= out->size;
}

bool hits_fetch(struct hits *h, const struct target *t, uint32_t first, uint8_t *data, uint32_t npages)
{
    return fetch(h, t, first, data, npages) == (int64_t)npages;
}

bool hits_hold(struct hits *h, const struct fuse_read_in *read_in, uint64_t turn)
{
    struct target t;
    /* A mark set since then stays: the READ that reaches it is for libfuse. */
    uint64_t offset = read_in->offset;
    if (!files_expect(&h->files, read_in->fh, offset, offset + read_in->size, true, &t) || t.unnoted)
        return false;
    if (t.turn != turn && !MUTANT(28))
        return false;
    add(&h->ahead_reads, 1);
    add(&h->reads, 1);
    add(&h->pages, read_in->size / TM_PAGE);
    add(&h->bytes, read_in->size);
    return true;
}
