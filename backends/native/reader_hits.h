/* READs of open files whose gates are open, answered at once. For any thread.
 *
 * Hits: all pages are in the pool. Small misses, if the kernel has the lower file's pages in its cache: they are read, put
 * and dropped there, as `fs/files.py` does. What keeps old bytes from being put after a change (docs/concurrency.md): whoever
 * changes a file says so to its gate first, and that waits for a put under way and voids what was read before. */
#ifndef READER_HITS_H
#define READER_HITS_H

#include "reader_files.h"

#include <linux/fuse.h>

struct hits {
    int device;
    size_t largest; /* bytes of a READ */
    struct files files;
    pthread_rwlock_t pool_lock; /* of the two below; read while a hit is fetched */
    bool has_pool;
    struct tm_handle pool;
    _Atomic uint64_t reads, pages, bytes; /* answered so far from the pool */
    _Atomic uint64_t miss_reads, miss_pages, lower_ns, put_ns, put_pages, refused_pages, overtaken_pages;
};

int hits_init(struct hits *h, int device, size_t largest); /* -1: no memory */
void hits_free(struct hits *h);
/* The pool that hits come from; NULL: none. Returns when no thread uses the one before. */
void hits_use(struct hits *h, const struct tm_handle *pool);
/* Answer a READ by way of `data` (a buffer) if that takes no waiting. One that reaches the end of its file asks the lower
 * where that is, which may take as long as the lower does not answer: only if the caller `may_wait`. */
bool hits_answer(struct hits *h, const struct fuse_in_header *in, const struct fuse_read_in *read_in, uint8_t *data,
                 bool may_wait);

#endif
