/* What a reader is made of, for its two halves: who reads requests (`reader.c`), and its life with what Python tells and asks
 * of it (`reader_life.c`). */
#ifndef READER_INSIDE_H
#define READER_INSIDE_H

#include "reader.h"
#include "reader_ahead.h"
#include "reader_eager.h"
#include "reader_listing.h"
#include "reader_listings.h"
#include "reader_opens.h"
#include "reader_piped.h"
#include "reader_rings.h"
#include "reader_onlookers.h"
#include "reader_sentry.h"
#include "reader_shortcut.h"
#include "reader_waiting.h"

enum { HELPERS_MOST = 8 };

/* One thread's buffers; whoever sleeps gives them back. */
struct desk {
    struct buffer *request, *data; /* NULL: none */
    struct buffer *together;       /* answers that are sent together; NULL: none yet, or none ever */
};

struct helper {
    struct reader *reader;
    struct desk desk;
    pthread_t thread;
};

struct reader {
    int device, ours, theirs;
    int others; /* epoll of everything but the device: to poll two descriptors costs half of what four do */
    int wake;   /* what else is in there, -1 nothing */
    _Atomic bool watched; /* the event loop's thread has changes underneath reported */
    struct hits hits;
    struct buffers *buffers;
    struct passing passing;
    struct waiting waiting; /* READs */
    struct waiting asking;  /* GETATTRs */
    struct shortcut shortcut;
    struct onlookers onlookers;
    struct onlookers openers; /* of files: those that hang hold up no names */
    _Atomic(struct nodes *) nodes, answering; /* the second: NULL, or the same */
    struct opens *opens;       /* a reference, of the event loop's thread; NULL: none */
    struct listings *listings; /* the same */
    struct ends ends;
    struct desk desk; /* of who calls reader_serve */
    struct ahead ahead;
    struct piped piped; /* of who calls reader_serve */
    struct sentry sentry;
    struct eager eager_hits, eager_python; /* by who has answered last */
    struct rings *rings; /* NULL: all requests come by the device */
    struct desk *ring_desks;
    pthread_mutex_t leads;  /* held by who is in reader_serve, or does there what `reader_rest` says */
    int64_t rested_ms;      /* when that was done last there */
    _Atomic uint32_t turns; /* raised when it is entered and when it is left: odd within */

    pthread_mutex_t sleep_lock;
    pthread_cond_t awake;
    unsigned nhelpers, calls;
    bool ending;
    _Atomic uint32_t idle, active;
    _Atomic bool paused;
    struct helper helpers[HELPERS_MOST];
    struct helper standin;
    bool has_standin;
    unsigned away_ms; /* after which it takes the place of the event loop's thread */
    _Atomic bool rests; /* the stand-in sleeps until the event loop's thread goes away, or is needed otherwise */
    pthread_cond_t needed;
    uint32_t looks, asked; /* asked: whether there is one CPU only */
    bool python_last; /* what was read last was not answered here */
    bool several, one_cpu; /* more than one request waited when it was looked last */

    _Atomic uint64_t woken, attributes, ended, lookups, found_awake;
    _Atomic uint64_t nopens, ncloses; /* answered */
};

bool desk_fill(struct reader *r, struct desk *d);
void desk_clear(struct desk *d);
/* Give memory back that was not used lately (since the last time); `all`: what can be. With `leads`. */
void reader_rest(struct reader *r, bool all);
int reader_watch(int epoll, int fd); /* -1: errno */
bool reader_take_from_ring(void *with, unsigned ring, struct entry *e);
/* The event loop's thread goes to where it may have to wait, and comes back; the stand-in comes if that takes long. */
void reader_leave(struct reader *r);
void reader_return(struct reader *r);
/* Whether a request is an OPEN that may need no Python; then answer it, if so. It must be a flight, for the lower may not answer. By the
 * event loop's thread within reader_serve. */
bool reader_may_open(struct reader *r, const struct fuse_in_header *in, size_t length);
bool reader_open_here(struct reader *r, const struct fuse_in_header *in, size_t length);
/* Answer a RELEASE that needs no Python. By the same. `held`: it is a flight. */
bool reader_close_here(struct reader *r, const struct fuse_in_header *in, size_t length, bool held);
/* Whether a request is one of an open directory, or opens one, and is answered here; then do so. It must be a flight. `asked`: it
 * was put by, and is not the caller's any more; NULL: it was not. By the event loop's thread. */
bool reader_lists(struct reader *r, const struct fuse_in_header *in, size_t length);
void reader_list_here(struct reader *r, const struct fuse_in_header *in, size_t length, struct asked *asked);
/* Whether a request lies for Python that needs it; of those before it some are `answered`, which is counted up. By the same. */
bool reader_asks(struct reader *r, unsigned *answered);
void *reader_help(void *arg);     /* a thread; `arg` is a helper */
void *reader_stand_in(void *arg); /* the same */

#endif
