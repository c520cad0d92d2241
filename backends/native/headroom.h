/* Headroom: what headroom.c and its Python binding share. */
#ifndef HEADROOM_H
#define HEADROOM_H

#include "tm.h"

#define HEADROOM_GROUPS 16 /* control groups above one another */

/* A control group; what has no limit, or more than the machine, is not looked at. */
struct headroom_group {
    int limit, usage, stat; /* its files; stat may be -1: then it has no page cache */
    uint64_t cache;         /* page cache that goes when memory is needed, as last summed up */
    uint64_t cache_at_ns;   /* and when that was */
};

/* What was seen of memory. */
struct headroom_look {
    uint64_t now_ns;
    uint64_t used;   /* by the segment, its reserve included */
    uint64_t limit;  /* of the segment, in force */
    int64_t spare;   /* of the tightest room beyond its margin; negative if less */
    uint64_t margin; /* of that room; 0: neither is known */
};

struct headroom_decision {
    uint64_t limit, persistent; /* of the segment, as tm_limit takes them */
    int move;                   /* -1: the limit falls, 1: it rises (to the least), 0: it stays */
    bool hard;                  /* so short that pages which were hit are not spared */
    uint64_t next_ns;           /* until the next look */
};

struct headroom {
    int meminfo; /* /proc/meminfo */
    int wake;    /* an eventfd: readable when something is to be looked at now */
    unsigned ngroups;
    struct headroom_group groups[HEADROOM_GROUPS];
    uint64_t total; /* memory of the machine, when it could be read last */
    _Atomic uint64_t keep; /* bytes of backed memory that stay in any case */
    _Atomic bool local;    /* this machine swaps to the segment */
    _Atomic bool ending;

    /* Of the thread that decides: how fast memory goes, measured over at least RATE_NS. */
    uint64_t rate_ns;   /* when the measurement began */
    int64_t rate_room;  /* what the segment could have then */
    uint64_t rate;      /* bytes a second */
    uint64_t vain_ns;   /* how long to wait while nothing can be given back */

    /* For who asks, each a word by itself. */
    _Atomic uint64_t looks, lowered, given_back, lowered_at_ns, used, margin;
    _Atomic int64_t spare;
    _Atomic bool is_short; /* pages that were hit had to go since somebody asked */
    _Atomic int urgency;   /* of the thread: 2 realtime, 1 a nice value, 0 as any other */
};

uint64_t margin_of(uint64_t total);
void headroom_look(struct headroom *h, struct tm_segment *seg, struct headroom_look *look);
struct headroom_decision headroom_decide(struct headroom *h, const struct headroom_look *look, uint64_t least,
                                         uint64_t most);
void headroom_run(struct tm_ctx *ctx, struct headroom *h);

#endif
