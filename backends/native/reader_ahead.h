/* The next piece of a stream, fetched from the pool before it is asked for, while who reads copies the last one; of large ones
 * a second thread may fetch a part while the last one is still written (`reader_window`, `reader_judge`). For the thread that
 * reads requests. What was fetched is worth nothing once anything was said to the file's gate. */
#ifndef READER_AHEAD_H
#define READER_AHEAD_H

#include "reader_judge.h"
#include "reader_window.h"

/* Of two windows: while one is sent, the second thread fills the other. */
struct room {
    uint8_t *memory; /* NULL: none now */
    size_t bytes;
    bool lately;     /* a window was begun in it since it was asked the last time */
};

struct ahead {
    struct window window;
    struct room small, large;  /* by what is read at a time */
    unsigned used;             /* which window was filled last */
    size_t length;             /* of what is in it or will be, 0 nothing */
    uint64_t fh, offset;       /* where that is from */
    uint64_t last_fh, last_end; /* of the last READ that was answered */
    struct judge judge;
    uint64_t judged_ns; /* when it was asked for the last window of this stream; 0: it was not */
};

void ahead_init(struct ahead *a, struct hits *h);
void ahead_free(struct ahead *a);
/* Give memory back that no window was begun in since the last time; `all`: what it can. */
void ahead_rest(struct ahead *a, bool all);
/* Whether the READ asks for what was fetched, and it still holds. */
bool ahead_has(struct ahead *a, struct hits *h, const struct fuse_read_in *read_in, struct answer *out);
/* A READ will be answered from the pool: whether the next one of its stream is worth fetching. */
bool ahead_expects(struct ahead *a, const struct fuse_read_in *read_in);
/* Begin with it, before the reply. `may_help`: there is a CPU for a second thread. */
void ahead_begin(struct ahead *a, struct hits *h, const struct fuse_read_in *read_in, bool may_help);
/* Fetch what is left, after the reply; `later`: not now, another request waits. */
void ahead_fetch(struct ahead *a, bool later);

#endif
