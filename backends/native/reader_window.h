/* A window of a stream, fetched from the pool in pieces: by the thread that leads (reads requests), and by a second one while
 * the first writes a reply, if it is lent to that.
 *
 * Each piece is claimed by one of them, in one step that also tells whether the window still is what it was. The second one claims
 * none any more once the window is taken back: who wakes from the reply wants its CPU. The memory is whose who leads made it,
 * and free for something else only once the window has ended: no piece is in the second one's hands. Nobody waits long for that.
 *
 * All but the fetching itself is for the thread that leads. */
#ifndef READER_WINDOW_H
#define READER_WINDOW_H

#include "reader_hits.h"

#include <semaphore.h>

struct window {
    struct hits *hits;
    /* What is fetched; changed only when no piece is in anybody's hands. */
    struct target target;
    uint8_t *data;
    uint32_t first, npages;
    bool opened; /* for claims */
    _Atomic uint64_t claims; /* how many pages there are, and in the lower half up to where they are claimed; 0: closed */
    _Atomic uint32_t left;   /* pages of pieces that are not done yet, whatever comes of them */
    _Atomic bool failed;     /* something is not in the pool */
    _Atomic bool lent;       /* the second one may claim */

    bool has_second, no_second; /* it runs; it could not be started */
    _Atomic bool ending;
    pthread_t thread;
    sem_t called;
};

enum { WINDOW_PIECE = 16 }; /* pages: 8 us, for which the second one keeps a CPU that is wanted at most */

void window_init(struct window *w, struct hits *hits);
void window_free(struct window *w); /* waits for the second one */
/* Fetch no more. Whether no piece is in the second one's hands. */
bool window_end(struct window *w);
/* Begin with another one: `npages` from `first` on to `data`, as the file was when `t` was made. It has ended before. Nothing is
 * written to `data` before it is lent or fetched. */
void window_begin(struct window *w, const struct target *t, uint32_t first, uint32_t npages, uint8_t *data);
/* Have the second one fetch, until it is taken back. */
void window_lend(struct window *w);
void window_take_back(struct window *w);
/* Take it back and fetch what is left. */
void window_fetch(struct window *w);
/* Whether all of it is there, after `window_fetch`. Waits for the second one's last piece, but not for long: it may have lost its CPU. */
bool window_whole(struct window *w);

#endif
