/* Who gets how much of the memory: weights, floors, and what a client is charged.
 *
 * Weights divide what ephemeral pages occupy. Whoever needs memory takes it from the client that has most per
 * weight, so under contention the shares converge to the ratio of the weights, whoever puts faster. Floors are
 * promises: chunks are kept free for clients that are below theirs, and their ephemeral pages are left alone. */
#include "tm.h"

/* What a full chunk holds in blocks of the least favourable size class: 15 raw pages. */
#define CHUNK_HOLDS 62400
/* Index that a floor stands for: one chunk of each kind of unit, and a sixteenth of the pages. */
enum { INDEX_KINDS = 5, INDEX_SHARE = 16 };

static uint32_t account_chunks(struct tm_segment *seg, uint32_t account)
{
    const struct tm_queue *q = seg->clients[account].queues;
    return atomic_load_explicit(&q[QUEUE_PROBATION].length, memory_order_relaxed)
           + atomic_load_explicit(&q[QUEUE_MAIN].length, memory_order_relaxed);
}

static bool owns(struct tm_segment *seg, uint32_t client, uint32_t shared)
{
    const struct tm_pool *p = &seg->pools[TM_FIRST_SHARED + shared];
    return atomic_load_explicit(&p->state, memory_order_relaxed) == LIVE
           && atomic_load_explicit(&p->owner, memory_order_relaxed) == client;
}

uint32_t client_chunks(struct tm_segment *seg, uint32_t client)
{
    uint32_t sum = account_chunks(seg, client);
    for (uint32_t i = 0; i < TM_MAX_SHARED; i++)
        if (owns(seg, client, i))
            sum += account_chunks(seg, TM_MAX_CLIENTS + i);
    return sum;
}

int64_t client_bytes(struct tm_segment *seg, uint32_t client)
{
    int64_t sum = atomic_load_explicit(&seg->clients[client].used_bytes, memory_order_relaxed);
    for (uint32_t i = 0; i < TM_MAX_SHARED; i++)
        if (owns(seg, client, i))
            sum += atomic_load_explicit(&seg->clients[TM_MAX_CLIENTS + i].used_bytes, memory_order_relaxed);
    return sum;
}

int64_t client_ephemeral(struct tm_segment *seg, uint32_t client)
{
    int64_t sum = atomic_load_explicit(&seg->clients[client].ephemeral, memory_order_relaxed);
    for (uint32_t i = 0; i < TM_MAX_SHARED; i++)
        if (owns(seg, client, i))
            sum += atomic_load_explicit(&seg->clients[TM_MAX_CLIENTS + i].ephemeral, memory_order_relaxed);
    return sum;
}

int fullest_account(struct tm_segment *seg, uint32_t client)
{
    int best = -1;
    uint32_t most = 0;
    for (uint32_t i = 0; i <= TM_MAX_SHARED; i++) {
        uint32_t account = i ? TM_MAX_CLIENTS + i - 1 : client;
        uint32_t chunks = i && !owns(seg, client, i - 1) ? 0 : account_chunks(seg, account);
        if (chunks > most) {
            most = chunks;
            best = (int)account;
        }
    }
    return best;
}

/* What the client was promised, whether or not anybody holds it now: servers are started again. */
static int64_t granted_floor(const struct tm_client *c)
{
    uint32_t state = atomic_load_explicit(&c->state, memory_order_relaxed);
    return state == LIVE || state == STAGED ? (int64_t)atomic_load_explicit(&c->floor_bytes, memory_order_relaxed) : 0;
}

static bool present(const struct tm_client *c)
{
    uint32_t state = atomic_load_explicit(&c->state, memory_order_relaxed);
    return (state == LIVE || state == STAGED) && atomic_load_explicit(&c->held, memory_order_relaxed) != 2;
}

/* What it may have now; nothing if it is gone. */
static int64_t floor_of(const struct tm_client *c) { return present(c) ? granted_floor(c) : 0; }

int victim(struct tm_segment *seg, int asker)
{
    int best = -1;
    uint64_t most = 0, its_weight = 1;
    bool floors = atomic_load_explicit(&seg->super->nfloors, memory_order_relaxed) != 0;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++) {
        struct tm_client *c = &seg->clients[i];
        uint64_t chunks = client_chunks(seg, i);
        if (!chunks)
            continue;
        if (floors && (int)i != asker && floor_of(c) > 0 && client_bytes(seg, i) < floor_of(c) + TM_CHUNK)
            continue; /* a chunk goes at once, and not below the floor */
        uint64_t weight = present(c) ? atomic_load_explicit(&c->weight, memory_order_relaxed) : 0;
        /* chunks / weight > most / its_weight; without a weight it comes before all that have one. */
        bool more = weight && its_weight ? chunks * its_weight > most * weight
                                         : (weight == its_weight ? chunks > most : !weight);
        if (best < 0 || more) {
            best = (int)i;
            most = chunks;
            its_weight = weight;
        }
    }
    if (best >= 0)
        return fullest_account(seg, (uint32_t)best);
    /* A shared pool whose members are all leaving belongs to nobody for a moment. */
    for (uint32_t i = TM_MAX_CLIENTS; i < TM_NACCOUNTS; i++)
        if (account_chunks(seg, i) && atomic_load(&seg->pools[TM_FIRST_SHARED + i - TM_MAX_CLIENTS].state) != LIVE)
            return (int)i;
    return -1;
}

/* What clients below their floors are still to get, but for the last piece that is less than a page. */
struct promise {
    uint64_t bytes;
    uint32_t index; /* chunks */
    bool any;       /* somebody has a floor, whether or not it has reached it */
};

static void add_promise(struct tm_segment *seg, uint32_t client, int64_t floor, struct promise *sum)
{
    const struct tm_client *c = &seg->clients[client];
    int64_t missing = floor - client_bytes(seg, client);
    sum->any |= floor > 0;
    if (missing < (int64_t)(TM_STRIDE_RAW))
        return;
    uint32_t has = atomic_load_explicit(&c->index_chunks, memory_order_relaxed);
    uint32_t needs = INDEX_KINDS + (uint32_t)(floor / TM_CHUNK / INDEX_SHARE);
    sum->bytes += (uint64_t)missing;
    sum->index += needs > has ? needs - has : 0;
}

static uint32_t promise_chunks(const struct promise *p)
{
    return (uint32_t)((p->bytes + CHUNK_HOLDS - 1) / CHUNK_HOLDS) + p->index;
}

/* Chunks that size classes leave half full: one each. Promises are kept beside them, so they come on top for whoever
 * has no promise to claim, for as long as anybody has a floor: who flushes and puts close below it needs them too. */
static uint32_t slack(const struct tm_segment *seg)
{
    return seg->nchunks / 16 < TM_NCLASSES ? seg->nchunks / 16 : TM_NCLASSES;
}

bool below_floor(struct tm_segment *seg, uint32_t client)
{
    return client < TM_MAX_CLIENTS && client_bytes(seg, client) < floor_of(&seg->clients[client]);
}

uint32_t promised_chunks(struct tm_segment *seg, uint32_t asker)
{
    struct promise sum = {0};
    if (!atomic_load_explicit(&seg->super->nfloors, memory_order_relaxed))
        return 0;
    /* Whoever is below its own floor takes what it was promised; all floors together fit. */
    if (below_floor(seg, asker))
        return 0;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        if (i != asker && atomic_load_explicit(&seg->clients[i].floor_bytes, memory_order_relaxed))
            add_promise(seg, i, floor_of(&seg->clients[i]), &sum);
    return sum.any ? promise_chunks(&sum) + slack(seg) : 0;
}

bool has_cap_for(struct tm_segment *seg, uint32_t client, int64_t bytes)
{
    uint64_t cap = atomic_load_explicit(&seg->clients[client].cap_bytes, memory_order_relaxed);
    return !cap || client_bytes(seg, client) + bytes <= (int64_t)cap;
}

bool may_grow(struct tm_segment *seg, uint32_t client, int64_t bytes)
{
    if (bytes <= 0 || !atomic_load_explicit(&seg->super->nfloors, memory_order_relaxed))
        return true;
    if (client_bytes(seg, client) + bytes <= floor_of(&seg->clients[client]))
        return true;
    return chunks_available(seg, chunk_limit(seg, true)) >= promised_chunks(seg, client);
}

/* Half of the memory is free beyond what was promised, and half of what the client may have. Pages that are put now
 * need not be compressed; when that has changed, they are (evict.c). Half, because then what is loose fits into the other
 * half once it is compressed, and nothing is evicted that would not have been. */
bool memory_is_plentiful(struct tm_segment *seg, uint32_t client)
{
    uint64_t cap = atomic_load_explicit(&seg->clients[client].cap_bytes, memory_order_relaxed);
    uint32_t limit = chunk_limit(seg, false);
    return chunks_available(seg, limit) >= limit / 2 + promised_chunks(seg, client)
           && (!cap || client_bytes(seg, client) < (int64_t)(cap / 2));
}

/* What a client with that floor is still to get, and the chunks that can be had from it. */
static void add_floor(struct tm_segment *seg, uint32_t client, int64_t bytes, struct promise *sum, uint64_t *evictable)
{
    uint64_t floor = (uint64_t)bytes, used = (uint64_t)client_bytes(seg, client);
    uint64_t ephemeral = client_chunks(seg, client), above = used > floor ? (used - floor) / TM_CHUNK : 0;
    *evictable += floor == 0 || ephemeral < above ? ephemeral : above;
    add_promise(seg, client, bytes, sum);
}

/* What all clients below their floors are still to get, and in `*evictable` the chunks that can be had for them. */
static struct promise promises(struct tm_segment *seg, int64_t (*floor_of_client)(const struct tm_client *c),
                               uint64_t *evictable)
{
    struct promise sum = {0};
    *evictable = 0;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        add_floor(seg, i, floor_of_client(&seg->clients[i]), &sum, evictable);
    return sum;
}

bool memory_is_left(struct tm_segment *seg)
{
    uint64_t evictable;
    uint32_t limit = chunk_limit(seg, false);
    struct promise sum = promises(seg, floor_of, &evictable);
    return promise_chunks(&sum) + (sum.any ? slack(seg) : 0) + limit / 8 < chunks_available(seg, limit) + evictable;
}

bool floors_fit(struct tm_segment *seg, uint32_t limit)
{
    uint64_t evictable;
    struct promise sum = promises(seg, floor_of, &evictable);
    return promise_chunks(&sum) + slack(seg) <= chunks_available(seg, limit) + evictable;
}

/* For who was refused: a larger floor of one client never fits where a smaller one does not. */
uint64_t most_floor(struct tm_segment *seg, uint32_t client, uint32_t limit)
{
    const struct tm_client *c = &seg->clients[client];
    struct promise others = {0};
    uint64_t from_others = 0, available = chunks_available(seg, limit);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        if (i != client)
            add_floor(seg, i, floor_of(&seg->clients[i]), &others, &from_others);
    uint64_t fits = atomic_load_explicit(&c->floor_bytes, memory_order_relaxed), above = seg->super->memory_bytes + 1;
    while (above > fits + 1) {
        uint64_t middle = fits + (above - fits) / 2, evictable = from_others;
        struct promise sum = others;
        add_floor(seg, client, present(c) ? (int64_t)middle : 0, &sum, &evictable);
        if (promise_chunks(&sum) + slack(seg) <= available + evictable)
            fits = middle;
        else
            above = middle;
    }
    return fits;
}

uint32_t least_limit(struct tm_segment *seg)
{
    uint64_t evictable, used = atomic_load_explicit(&seg->super->nused, memory_order_relaxed);
    struct promise sum = promises(seg, granted_floor, &evictable);
    uint64_t least = (used > evictable ? used - evictable : 0) + chunks_kept(seg);
    if (sum.any)
        least += promise_chunks(&sum) + slack(seg);
    return least < seg->nchunks ? (uint32_t)least : seg->nchunks;
}
