/* Whether to look for the next request again and again for a moment, instead of sleeping until it comes.
 *
 * To sleep costs a hit more than all else where the client has a CPU of its own: two threads that take turns on two CPUs
 * have both CPUs halt and be woken for each request. And where client and daemon share a CPU, the client has often run
 * by the time its reply is written, so that its next request is there already. But a look that finds nothing keeps
 * a CPU from others. So it is tried where it has paid lately: a failure weighs as much as LOSS successes, and
 * after some failures it is left alone for a while, longer each time. A while, not a number of requests: the scheduler may
 * give a program a CPU of its own at any time, and a trial each 32 ms costs 0.3 % of a CPU. A trial outlives one
 * failure, for the first of many requests that follow each other come late.
 *
 * For one thread; no clock of its own, so that it can be tested. */
#ifndef READER_EAGER_H
#define READER_EAGER_H

#include <stdbool.h>
#include <stdint.h>

struct eager {
    uint64_t until_ns;     /* look until then; 0: sleep */
    unsigned looks;        /* so far; a request that is there at the first says nothing: nobody was waited for */
    unsigned credit;       /* at most EAGER_MOST; 0: tried from `again_ns` on */
    uint64_t again_ns;
    uint64_t rest_ns;      /* how long it will be left alone after the next failure */
};

enum { EAGER_NS = 50000, EAGER_MOST = 16, EAGER_LOSS = 4, EAGER_TRIAL = 2 * EAGER_LOSS, EAGER_REST_NS = 1000000, EAGER_REST_MOST_NS = 32000000 };

/* A request was answered: its program may have another one. */
void eager_answered(struct eager *e, uint64_t now_ns);
/* Whether it has to be asked whether to look now. */
static inline bool eager_tries(const struct eager *e) { return e->until_ns; }
/* Whether to look now. */
bool eager_looks(struct eager *e, uint64_t now_ns);
/* A request was there. Returns whether it was looked for. */
bool eager_found(struct eager *e);
/* Whether it has paid lately: programs run while replies are written, so they have CPUs of their own. */
static inline bool eager_pays(const struct eager *e) { return e->credit > 0; }
/* What is waited for is something else: no verdict. */
static inline void eager_end(struct eager *e) { e->until_ns = 0; }

#endif
