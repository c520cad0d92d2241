/* READs of open files whose gates are open. For any thread.
 *
 * Hits: all pages are in the pool. Misses: the lower file's pages are read, put and dropped from the kernel's cache, as
 * `fs/files.py` does; at once if they are few and the kernel has them, else by who may wait (`reader_waiting`). What keeps
 * old bytes from being put after a change (docs/concurrency.md): whoever changes a file says so to its gate first, and
 * that waits for a put under way and voids what was read before. */
#ifndef READER_HITS_H
#define READER_HITS_H

#include "reader_files.h"

#include <linux/fuse.h>

struct hits {
    size_t largest; /* bytes of a READ */
    _Atomic bool leaves_copies; /* the lower cannot read without keeping a copy in the kernel's cache */
    _Atomic bool doubts;        /* nobody tells gates of changes underneath: ask each local file itself whether it has changed */
    struct files files;
    pthread_rwlock_t pool_lock; /* of the two below; read while a hit is fetched */
    bool has_pool;
    struct tm_handle pool;
    _Atomic uint64_t reads, pages, bytes; /* answered so far from the pool */
    _Atomic uint64_t ahead_reads; /* of those with what was fetched ahead */
    _Atomic uint64_t miss_reads, miss_pages, lower_ns, put_ns, put_pages, refused_pages, overtaken_pages;
};

enum found { FOUND, FOUND_IF_WAITING, FOUND_NOT };
struct answer {
    const uint8_t *bytes;
    size_t length;
    /* What was read of the lower file for it and is not in the pool yet. */
    struct {
        struct missed missed; /* its gate is NULL if there is nothing */
        uint32_t first, npages;
        const uint8_t *pages;
        bool copied; /* the kernel may have a copy */
    } unput;
};

int hits_init(struct hits *h, size_t largest); /* -1: no memory */
void hits_free(struct hits *h);
/* The pool that hits come from; NULL: none. Returns when no thread uses the one before. */
void hits_use(struct hits *h, const struct tm_handle *pool);
/* Drop every page of an object; false: there is no pool, or it failed. */
bool hits_flush(struct hits *h, const uint8_t *oid);
/* Find the answer to a READ by way of `data` (a buffer), and call `hits_put` then. FOUND_IF_WAITING: it takes waiting for the
 * lower, so call again, with the file held, and `waits` set. FOUND_NOT: it is for libfuse. */
enum found hits_find(struct hits *h, const struct fuse_read_in *read_in, uint8_t *data, bool waits, struct answer *out);
/* The same by who may wait, but only begins to once `begin` was called and has agreed: else it is FOUND_IF_WAITING. */
struct wait {
    bool (*begin)(void *with);
    void *with;
    bool begun;
    uint64_t begun_ns, ended_ns; /* monotonic; the second 0: the lower was not read */
};
enum found hits_find_or_wait(struct hits *h, const struct fuse_read_in *read_in, uint8_t *data, struct wait *wait,
                             struct answer *out);
/* Put what was read for an answer, of which nothing else is looked at. After the reply it keeps nobody waiting; but then nobody
 * may close the file meanwhile. */
void hits_put(struct hits *h, struct answer *a);
/* Whether a READ that may come can be answered from whole pages, as far as the file's gate says; then what to fetch, in pieces. */
bool hits_expect(struct hits *h, uint64_t fh, uint64_t offset, uint32_t size, struct target *out);
/* Fetch pages of it, all or none. For any thread. */
bool hits_fetch(struct hits *h, const struct target *t, uint32_t first, uint8_t *data, uint32_t npages);
/* Whether what was fetched in that turn answers this READ, which is then counted as a hit. */
bool hits_hold(struct hits *h, const struct fuse_read_in *read_in, uint64_t turn);

#endif
