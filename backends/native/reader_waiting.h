/* READs that wait for the lower, and GETATTRs of one that may not answer, in threads of their own, so that hits and other requests do not
 * wait behind them.
 *
 * Each is a flight meanwhile (`reader_passing.h`): its program may be killed, and is then answered at once, whatever the
 * lower does; the thread goes on, and its bytes are for the pool alone. A file that is closed meanwhile stays open until
 * then (`files_hold`). What cannot be answered here after all goes to libfuse. Threads are started as they are needed; when
 * all wait, requests go to libfuse at once, which has threads of its own. Each kind has its own threads: READs of files that are open need
 * not wait for attributes.
 *
 * A GETATTR is always waited for by a thread, if the lower is not local: a network file system answers most at once, of what it has
 * been told before, and then one day not at all; no earlier answer tells.
 *
 * A lower that usually answers about as fast as threads are switched (`quick_us`) is waited for by who has read the request,
 * if no other one waits. "Usually" is the mean, of which the last answer is an eighth: the first one that takes many times as long ends that,
 * until several quick ones have followed, and one that takes twice as long does not, for it costs less than what threads cost the next dozen.
 * So others wait for at most one slow answer, and for one that does not come until the stand-in takes over. */
#ifndef READER_WAITING_H
#define READER_WAITING_H

#include "reader_hits.h"
#include "reader_nodes.h"
#include "reader_passing.h"

#include <semaphore.h>

enum { WAITERS_MOST = 16 }; /* so many READs at a time keep any disk busy */

struct errand;
struct waiting {
    struct hits *hits;
    struct passing *passing;
    int64_t quick_ns;
    struct patience patience; /* with such READs */
    pthread_mutex_t lock;
    unsigned nthreads, nidle;
    bool ending;
    struct waiter *idle[WAITERS_MOST]; /* the last used is called first */
    struct waiter {
        struct waiting *waiting;
        pthread_t thread;
        sem_t called;
        struct errand *errand; /* NULL when called: the end */
    } waiters[WAITERS_MOST];
};

void waiting_init(struct waiting *w, struct hits *hits, struct passing *passing, unsigned quick_us);
/* Whether no READ is in hand. One that is not under way any more (`passing_quiet`) may still have to be answered. */
bool waiting_quiet(struct waiting *w);
/* Take no more READs, and wait for those that there are, and so for the lower. */
void waiting_end(struct waiting *w);
void waiting_free(struct waiting *w); /* once nobody calls `waiting_give` any more */
/* Have the READ in `*request` found by way of `*data`: buffers that are not the caller's any more, and NULL, if it
 * comes back true. `entry` brought it (NULL: the device). */
bool waiting_give(struct waiting *w, struct buffer **request, struct buffer **data, size_t length, struct entry *entry);

/* The same for a GETATTR of what is not here; `local`: the root's device is. */
bool waiting_ask(struct waiting *w, struct nodes *nodes, bool local, const struct fuse_in_header *in, size_t length, struct entry *entry);

/* What whoever waits itself does before that, and after it. */
struct away {
    void (*leave)(void *with), (*come_back)(void *with);
    void *with;
};

/* Whether it will probably be quick. */
bool waiting_is_quick(const struct waiting *w);
/* Find the answer to a READ as `hits_find` does for who may not wait; but if the lower is to be waited for, do that and answer
 * it, at once: true then. In between the caller is `away`. `replies_first`: what was read is put after the reply, which only who
 * reads the next request may do: it would not find the pages yet. */
bool waiting_find(struct waiting *w, struct buffer **request, uint8_t *data, size_t length, const struct away *away, bool replies_first,
                  enum found *found, struct answer *out);

/* Start a thread of the reader: with a small stack, and no signals: those are for the threads that Python knows. */
int reader_thread(pthread_t *thread, void *(*run)(void *), void *arg);

#endif
