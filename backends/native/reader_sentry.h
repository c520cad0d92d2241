/* Sleeping in read(2) of the device instead of poll(2), for the thread that serves: a fifth less of a hit where its program runs
 * on the same CPU. poll has to be told of two descriptors, asks both before and after it sleeps, and the read comes on top.
 *
 * Asleep in read it hears of nothing else. So another thread, the sentry, waits for all else meanwhile, and for the deadline,
 * and calls it back by a signal (SIGURG, whose default is to be ignored). A signal that comes just before the read began is
 * lost; it is sent again every CALL_MS until it was heard. Between two sleeps the serving thread sees that it was called without one.
 *
 * While a sentry is posted the device has no O_NONBLOCK, for everybody: nobody else may read it then. To set and take it back costs
 * two system calls, so a serving thread that goes away for a moment leaves it as it is, and whoever reads instead sets it first.
 * All but the sentry itself, and `sentry_look`, is for the serving thread. */
#ifndef READER_SENTRY_H
#define READER_SENTRY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct sentry {
    int device, others; /* what the thread sleeps on, and what has it called if it is readable */
    int flags;          /* of the device, with O_NONBLOCK */
    _Atomic bool blocks; /* the device may have no O_NONBLOCK now */
    bool is_posted;     /* as the serving thread has left it */
    bool hears;         /* the serving thread does not block the signal */
    bool is_broken;     /* there can be no sentry */
    bool has_thread;
    _Atomic bool called;
    _Atomic uint64_t posts; /* so far */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t thread;
    int recall;       /* an eventfd: have it look at the deadline again */
    pthread_t serves; /* who is called */
    bool on, ending, rests;
    int64_t until_ms, waits_until_ms; /* CLOCK_MONOTONIC, INT64_MAX: no deadline; the second: as far as it waits now */
};

enum { CALL_MS = 1 };

static inline bool sentry_is_posted(const struct sentry *s) { return s->is_posted; }
static inline bool sentry_calls(const struct sentry *s) { return atomic_load_explicit(&s->called, memory_order_relaxed); }
void sentry_init(struct sentry *s, int device, int others);
void sentry_free(struct sentry *s);
/* Another thread may serve from now on, or the same one with another mask of signals. */
static inline void sentry_meet(struct sentry *s) { s->hears = false; }
/* Post one, if there is none. Returns whether the device may be slept on now: not if the caller was called, or if there can be no
 * sentry. Others may be readable before it: then the caller is called. */
bool sentry_post(struct sentry *s, int64_t until_ms);
/* Have the device not be slept on, with the sentry at its post, if it is. For any thread that the serving one cannot post beside. */
void sentry_look(struct sentry *s);
/* Whether one is posted, and has not called. */
static inline bool sentry_holds(const struct sentry *s) { return s->is_posted && !sentry_calls(s); }
/* Have the device as it was before. No signal comes after this. Returns whether the caller had been called. */
bool sentry_relieve(struct sentry *s);
/* The same, but whoever reads the device next has to `sentry_look` or `sentry_relieve` first, unless it sleeps on it. */
bool sentry_step_down(struct sentry *s);

#endif
