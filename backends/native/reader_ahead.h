/* The next piece of a stream, fetched from the pool before it is asked for, while who reads copies the last one. For one
 * thread. What was fetched is worth nothing once anything was said to the file's gate. */
#ifndef READER_AHEAD_H
#define READER_AHEAD_H

#include "reader_buffers.h"
#include "reader_hits.h"

struct ahead {
    struct buffer *buffer; /* NULL: none */
    size_t length;         /* of what is in it, 0 nothing */
    uint64_t fh, offset;   /* where that is from */
    uint64_t turn;         /* of the file's gate then */
    uint64_t last_fh, last_end; /* of the last READ that was answered */
};

/* Whether the READ asks for what was fetched, and it still holds. */
bool ahead_has(struct ahead *a, struct hits *h, const struct fuse_read_in *read_in, struct answer *out);
/* A READ was answered from the pool: whether the next one of its stream is worth fetching. */
bool ahead_expects(struct ahead *a, const struct fuse_read_in *read_in);
/* Fetch it. */
void ahead_fetch(struct ahead *a, struct hits *h, struct buffers *buffers, const struct fuse_read_in *read_in);
void ahead_clear(struct ahead *a);

#endif
