#include "reader_hits.h"

#include "reader_passing.h"

#include <sys/stat.h>

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

bool hits_answer(struct hits *h, const struct fuse_in_header *in, const struct fuse_read_in *read_in, uint8_t *data)
{
    uint64_t offset = read_in->offset, end = offset + read_in->size;
    struct target t;
    struct stat st;
    if (read_in->size > h->largest || end < offset || end > (UINT64_C(1) << 32) * TM_PAGE
        || !files_find(&h->files, read_in->fh, end, &t))
        return false;
    if (end > t.size) { /* whatever reaches the end asks where that is now */
        if (fstat(t.fd, &st) || (uint64_t)st.st_size != t.size)
            return false;
        end = t.size;
    }
    if (end <= offset) {
        reply_bytes(h->device, in->unique, NULL, 0);
        return true;
    }
    uint64_t first = offset / TM_PAGE, npages = (end + TM_PAGE - 1) / TM_PAGE - first;
    if (fetch(h, &t, (uint32_t)first, data, (uint32_t)npages) != (int64_t)npages)
        return false;
    add(&h->reads, 1);
    add(&h->pages, npages);
    add(&h->bytes, end - offset);
    reply_bytes(h->device, in->unique, data + offset % TM_PAGE, end - offset);
    return true;
}
