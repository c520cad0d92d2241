/* Deterministic interleavings of a repair with those who live, and of two repairs: what a repairer looks at and does must
 * be one step for them.
 *
 *   repairs PATH [scenario]
 *
 * Thread numbers matter here: `prev` of a chunk is its owner's, or a link of the bin's list, and that of a list's first
 * chunk is 0, which is the number of the first thread, too. */
#include "scenarios.h"
#include "sizes.h"

enum { WORDS = 300, PER_CHUNK = 26 }; /* a page with so many random words, and how many of that size a chunk holds */

static int64_t wait_only(struct world *w, struct actor *a)
{
    (void)a;
    wait_first(w, a, 0);
    return 0;
}

static int64_t put_one(struct world *w, uint32_t point, struct actor *a)
{
    wait_first(w, a, point);
    return put(&w->pool, 1, 2);
}
static int64_t put_to_11(struct world *w, struct actor *a) { return put_one(w, 11, a); }

static int64_t reap_to(struct world *w, struct actor *a, uint32_t point)
{
    wait_first(w, a, point);
    return (int64_t)tm_reap(ctx_get(w->seg));
}
static int64_t reap_to_39(struct world *w, struct actor *a) { return reap_to(w, a, 39); }
static int64_t reap_to_48(struct world *w, struct actor *a) { return reap_to(w, a, 48); }
static int64_t reap_to_49(struct world *w, struct actor *a) { return reap_to(w, a, 49); }
static int64_t reap_to_end(struct world *w, struct actor *a) { return reap_to(w, a, 0); }

static pid_t begin(int i, operation op)
{
    pid_t pid = start(i, op, 99, 0);
    at_point(i);
    return pid;
}

/* A dead thread's repairer looks for chunks that it was populating or punching, and sees one that somebody who lives is
 * populating. That one goes on and uses it: it must not be punched. */
static void busy_chunk_of_another(struct world *w)
{
    ctx_release(w->seg); /* so that the first actor is thread 0 */
    pid_t dead = begin(0, wait_only), repairer = begin(1, reap_to_39), putter = begin(2, put_to_11);
    ctx_get(w->seg);
    die(dead);
    go_on(2);
    go_on(1);
    finish(2, putter);
    finish(1, repairer);
    expect(actors[2].result == 1 && holds(&w->pool, 1, 2), "the page that was put is lost");
    check(w);
}

/* Persistent pages of one size, in the pool's second leaf so that other pages' index is there; index counts from 64. */
static int64_t put_same(struct world *w, uint32_t i) { return put_sized(&w->pool, 64 + i, WORDS); }

static int64_t flush_last(struct world *w, struct actor *a)
{
    wait_first(w, a, 15);
    return tm_flush(&w->pool, oid, 64, 1);
}
static int64_t put_to_4(struct world *w, struct actor *a)
{
    wait_first(w, a, 4);
    return put_same(w, 1);
}

/* A thread dies when it has released a chunk and its intent still stands. Somebody takes the chunk, and lists it, while
 * the repairer looks whose it is. */
static void released_chunk_of_another(struct world *w)
{
    put_same(w, 0);
    ctx_release(w->seg);
    pid_t dead = begin(0, flush_last), repairer = begin(1, reap_to_48), putter = begin(2, put_to_4);
    ctx_get(w->seg);
    go_on(0);
    die(dead);
    go_on(2);
    go_on(1);
    goes_on(2);
    finish(1, repairer);
    finish(2, putter);
    expect(actors[2].result == 1 && holds_sized(&w->pool, 65, WORDS), "the page that was put is lost");
    check(w);
}

static int64_t replace_first(struct world *w, struct actor *a)
{
    (void)a;
    return put_same(w, 0);
}

/* One thread dies when its new block is in the slot, another one when it has replaced that block and not freed it: both
 * repairers may free it, at the same time, and one must. */
static void block_of_two_dead(struct world *w)
{
    for (uint32_t i = 0; i < 4; i++) /* more in the same chunk, so that it stays */
        put_same(w, i);
    pid_t first = begin(0, reap_to_49), second = begin(2, reap_to_end);
    pid_t putter = start(1, replace_first, 41, 0);
    at_point(1);
    pid_t replacer = start(3, replace_first, 41, 0);
    at_point(3);
    die(putter);
    die(replacer);
    go_on(0);
    let_second_go_first(w, first, second);
    for (uint32_t i = 0; i < 4; i++)
        expect(holds_sized(&w->pool, 64 + i, WORDS), "page %u is lost", i);
    expect(atomic_load(&w->seg->super->deaths) == 2, "%llu deaths were noticed",
           (unsigned long long)atomic_load(&w->seg->super->deaths));
}

static int64_t flush_first(struct world *w, struct actor *a)
{
    (void)a;
    return tm_flush(&w->pool, oid, 64, 1);
}
static int64_t flush_beyond(struct world *w, struct actor *a)
{
    wait_first(w, a, 13);
    return tm_flush(&w->pool, oid, 64 + 2 * PER_CHUNK, 1);
}
static int64_t put_more(struct world *w, struct actor *a)
{
    wait_first(w, a, 19);
    atomic_store(&a->skip, 2);
    return put_same(w, 200);
}

/* A bin's lock is taken over from the dead. While the taker counts what is free in a chunk that its owner is releasing, the
 * chunk becomes another bin's. */
static void released_chunk_beside_repair(struct world *w)
{
    for (uint32_t i = 0; i <= 2 * PER_CHUNK; i++)
        put_same(w, i);
    pid_t repairer = begin(2, put_more), owner = begin(0, flush_beyond);
    go_on(0); /* the page was alone in its chunk, which it owns now */
    pid_t dead = start(1, flush_first, 5, 0);
    at_point(1);
    die(dead);
    go_on(2);
    bool early = goes_on(0);
    if (early) /* the mutant: the chunk is another bin's now */
        put_sized(&w->pool, 60, 500);
    finish(2, repairer);
    finish(0, owner);
    if (!early)
        put_sized(&w->pool, 60, 500);
    expect(holds_sized(&w->pool, 60, 500), "the page of the other bin is lost");
    check(w);
}

static int64_t evict_to_58(struct world *w, struct actor *a)
{
    wait_first(w, a, 58);
    return (int64_t)tm_evict(ctx_get(w->seg), -1, TM_CHUNK, true);
}
static int64_t flush_ephemeral(struct world *w, struct actor *a)
{
    wait_first(w, a, 13);
    return tm_flush(&w->ephemeral, oid, 64, 1);
}

/* A chunk is to be drained that its owner is releasing: it becomes another bin's while its owner is looked for. */
static void released_chunk_beside_drain(struct world *w)
{
    put_sized(&w->ephemeral, 64, WORDS);
    put_same(w, 1);
    pid_t drainer = begin(0, evict_to_58), owner = begin(1, flush_ephemeral);
    go_on(1);
    go_on(0);
    bool early = goes_on(1);
    if (early) /* the mutant */
        put_sized(&w->pool, 60, 500);
    finish(0, drainer);
    finish(1, owner);
    if (!early)
        put_sized(&w->pool, 60, 500);
    expect(holds_sized(&w->pool, 60, 500), "the page of the other bin is lost");
    check(w);
}

static int64_t put_smaller(struct world *w, struct actor *a)
{
    (void)a;
    return put_sized(&w->pool, 64, WORDS / 3);
}
static int64_t put_larger(struct world *w, struct actor *a)
{
    (void)a;
    return put_sized(&w->pool, 64, WORDS + 100);
}
static int64_t reap_to_13(struct world *w, struct actor *a) { return reap_to(w, a, 13); }

/* One thread dies with both a new and an old block that no slot refers to, each alone in its chunk. Its repairer frees the
 * first, owns the chunk, and dies; the next one frees the other. */
static void two_chunks_of_one_repair(struct world *w)
{
    put_same(w, 0);
    put_sized(&w->pool, 65, 0); /* same-filled: the leaf stays */
    pid_t first = start(0, put_smaller, 40, 0);
    at_point(0);
    pid_t second = start(1, put_larger, 41, 0);
    at_point(1);
    pid_t repairer = begin(2, reap_to_13);
    die(first);
    die(second);
    go_on(2);
    die(repairer);
    check(w); /* no chunk is owned by the dead */
}

static const struct scenario scenarios[] = {
    {"two_chunks_of_one_repair", two_chunks_of_one_repair},
    {"busy_chunk_of_another", busy_chunk_of_another},
    {"released_chunk_of_another", released_chunk_of_another},
    {"block_of_two_dead", block_of_two_dead},
    {"released_chunk_beside_repair", released_chunk_beside_repair},
    {"released_chunk_beside_drain", released_chunk_beside_drain},
};

int main(int argc, char **argv)
{
    return run_scenarios(argc, argv, scenarios, sizeof scenarios / sizeof *scenarios);
}
