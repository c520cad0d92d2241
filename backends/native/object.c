/* Whole objects: flushing one, and giving back the memory of empty ones and of those of a dying pool.
 *
 * An object dies in three steps. It is CONDEMNED under its shard lock (state 2, listed in our thread record); its
 * slots are made DEAD one by one, so that a put that had found a slot before fails its compare-and-swap and looks
 * up again; it is unlinked, and after a grace period its units are freed. Only in a dying pool are pages dropped
 * on the way: elsewhere the first page found means that the object is in use, and it is brought back to life. */
#include "tm.h"

#include <string.h>

static bool visit_node(struct tm_segment *seg, _Atomic uint32_t *parent, unsigned level, uint32_t leaf,
                       unit_visitor visit, void *arg)
{
    uint32_t ref = atomic_load(parent);
    if (!ref)
        return true;
    if (level == 0)
        return visit(arg, UNIT_FULL, ref, parent, leaf << 9);
    _Atomic uint32_t *entries = meta_at(seg, ref);
    for (uint32_t i = 0; i < 1024; i++)
        if (!visit_node(seg, &entries[i], level - 1, leaf + (i << (level == 2 ? 10 : 0)), visit, arg))
            return false;
    return visit(arg, UNIT_NODE, ref, parent, leaf << 9);
}

bool object_visit(struct tm_segment *seg, struct tm_object *o, unit_visitor visit, void *arg)
{
    uint32_t ref;
    if ((ref = atomic_load(&o->tiny)) && !visit(arg, UNIT_TINY, ref, &o->tiny, 0))
        return false;
    if ((ref = atomic_load(&o->small)) && !visit(arg, UNIT_SMALL, ref, &o->small, 0))
        return false;
    for (uint32_t i = 0; i < 8; i++)
        if ((ref = atomic_load(&o->leaf[i])) && !visit(arg, UNIT_FULL, ref, &o->leaf[i], i << 9))
            return false;
    for (uint32_t i = 0; i < 8; i++)
        if (!visit_node(seg, &o->root[i], 2, i << 20, visit, arg))
            return false;
    return true;
}

struct walk {
    struct tm_ctx *ctx;
    uint32_t pool;
    int64_t found; /* pages that went */
    bool force;
    bool (*each)(struct walk *w, slot_t *slot); /* false ends the walk */
};

static bool walk_unit(void *arg, unsigned kind, uint32_t ref, _Atomic uint32_t *parent, uint32_t first)
{
    struct walk *w = arg;
    (void)parent;
    (void)first;
    slot_t *slots = meta_at(w->ctx->seg, ref);
    for (uint32_t i = 0; kind != UNIT_NODE && i < unit_slots(kind); i++)
        if (!w->each(w, &slots[i]))
            return false;
    return true;
}

/* Call `each` for every slot of the object; false if it ended the walk. */
static bool walk_slots(struct walk *w, struct tm_object *o, bool (*each)(struct walk *w, slot_t *slot))
{
    w->each = each;
    return object_visit(w->ctx->seg, o, walk_unit, w);
}

static bool flush_slot(struct walk *w, slot_t *slot)
{
    w->found += slot_flush(w->ctx, w->pool, slot, SLOT_EMPTY);
    return true;
}

int64_t object_flush(struct tm_ctx *ctx, struct tm_object *o)
{
    struct walk w = {.ctx = ctx, .pool = o->pool};
    walk_slots(&w, o, flush_slot);
    return w.found;
}

static bool kill_slot(struct walk *w, slot_t *slot)
{
    uint64_t word = atomic_load(slot);
    if (slot_type(word) == SLOT_DEAD)
        return true;
    if (w->force) {
        w->found += slot_flush(w->ctx, w->pool, slot, SLOT_DEAD);
        return true;
    }
    if (slot_type(word) != SLOT_EMPTY
        || ((w->ctx->seg->pools[w->pool].persistent || is_originals(w->pool)) && ghost_is_fresh(w->ctx->seg, w->pool, word)))
        return false;
    return atomic_compare_exchange_strong(slot, &word, slot_next(word, SLOT_DEAD, 0));
}

static bool revive_slot(struct walk *w, slot_t *slot)
{
    uint64_t word = atomic_load(slot);
    (void)w;
    if (slot_type(word) == SLOT_DEAD)
        atomic_compare_exchange_strong(slot, &word, slot_next(word, SLOT_EMPTY, 0));
    return true;
}

static bool slot_is_forgotten(struct walk *w, slot_t *slot)
{
    uint64_t word = atomic_load_explicit(slot, memory_order_relaxed);
    return slot_type(word) == SLOT_EMPTY && !ghost_is_fresh(w->ctx->seg, w->pool, word);
}

static bool free_unit(void *arg, unsigned kind, uint32_t ref, _Atomic uint32_t *parent, uint32_t first)
{
    struct walk *w = arg;
    (void)kind;
    (void)first;
    /* Both intents first: a repairer clears the reference, then frees the unit, and can begin the walk again. */
    atomic_store(&w->ctx->rec->meta_parent, off(w->ctx->seg, parent));
    atomic_store(&w->ctx->rec->meta_old, ref);
    KP(25);
    atomic_store(parent, 0);
    meta_free(w->ctx, ref);
    return true;
}

static struct tm_lock *shard_lock(struct tm_segment *seg, const struct tm_object *o)
{
    struct tm_lock *shard = shard_of(seg, object_hash(o->pool, o->oid));
    lock_take(shard);
    return shard;
}

static void unlink_locked(struct tm_segment *seg, uint32_t ref)
{
    struct tm_object *o = meta_at(seg, ref);
    _Atomic uint32_t *word = &seg->buckets[object_hash(o->pool, o->oid) & (seg->super->nbuckets - 1)];
    for (uint32_t here; (here = atomic_load(word)); word = &((struct tm_object *)meta_at(seg, here))->next)
        if (here == ref) {
            atomic_store(word, atomic_load(&o->next));
            return;
        }
}

static bool count_unit(void *arg, unsigned kind, uint32_t ref, _Atomic uint32_t *parent, uint32_t first)
{
    int64_t *n = arg;
    (void)kind;
    (void)ref;
    (void)parent;
    (void)first;
    ++*n;
    return true;
}

int64_t object_units(struct tm_segment *seg, struct tm_object *o)
{
    int64_t n = 0;
    object_visit(seg, o, count_unit, &n);
    return n;
}

/* Go on with the object of intent `dying`, wherever its destroyer stopped. True if it is doomed now. */
static bool kill_dying(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t ref = atomic_load(&ctx->rec->dying);
    struct tm_object *o = meta_at(seg, ref);
    struct tm_lock *shard;
    if (atomic_load(&o->state) == 2) {
        struct walk w = {.ctx = ctx, .pool = o->pool, .force = atomic_load(&seg->pools[o->pool].state) == 2};
        bool killed = walk_slots(&w, o, kill_slot);
        if (!killed)
            walk_slots(&w, o, revive_slot);
        KP(27);
        shard = shard_lock(seg, o);
        if (killed) {
            unlink_locked(seg, ref);
            atomic_fetch_sub(&seg->pools[o->pool].objects, 1);
            atomic_fetch_sub(&seg->pools[o->pool].nodes, object_units(seg, o));
            if (!MUTANT(26))
                note_change(ctx);
            KP(24);
        }
        atomic_store(&o->state, killed ? 3 : 1);
        lock_drop(shard);
    }
    bool doomed = atomic_load(&o->state) == 3;
    if (doomed && atomic_load(&ctx->rec->doomed) != ref) {
        o->batch = atomic_load(&ctx->rec->doomed); /* nobody else reaches it any more */
        atomic_store(&ctx->rec->doomed, ref);
    }
    KP(28);
    atomic_store(&ctx->rec->dying, 0);
    return doomed;
}

/* Begin the end of the object at `ref`, if it is one and lives. True if it is doomed now. Inside an operation. */
static bool object_kill(struct tm_ctx *ctx, uint32_t ref)
{
    struct tm_object *o = meta_at(ctx->seg, ref);
    struct tm_lock *shard = shard_lock(ctx->seg, o);
    bool mine = object_find(ctx->seg, o->pool, o->oid) == ref && atomic_load(&o->state) == 1;
    if (mine) {
        o->owner = ctx->index + 1;
        atomic_store(&ctx->rec->dying, ref);
        KP(26);
        atomic_store(&o->state, 2);
    }
    lock_drop(shard);
    return mine && kill_dying(ctx);
}

bool object_finish(struct tm_ctx *ctx)
{
    uint32_t ref;
    if (!atomic_load(&ctx->rec->doomed))
        return true;
    if (!grace(ctx, 1000))
        return false;
    while ((ref = atomic_load(&ctx->rec->doomed))) {
        struct tm_object *o = meta_at(ctx->seg, ref);
        struct walk w = {.ctx = ctx, .pool = o->pool};
        object_visit(ctx->seg, o, free_unit, &w);
        atomic_store(&ctx->rec->meta_parent, 0);
        atomic_store(&ctx->rec->meta_old, ref);
        KP(29);
        atomic_store(&ctx->rec->doomed, o->batch);
        atomic_store(&o->state, 0);
        meta_free(ctx, ref);
    }
    return true;
}

void object_repair(struct tm_ctx *ctx)
{
    uint32_t ref = atomic_load(&ctx->rec->dying);
    if (!ref)
        return;
    struct tm_object *o = meta_at(ctx->seg, ref);
    KP(38);
    if (atomic_load(&o->state) >= 2 && o->owner == ctx->index + 1)
        kill_dying(ctx);
    atomic_store(&ctx->rec->dying, 0);
}

uint32_t object_at(struct tm_segment *seg, uint32_t pool, uint32_t c, uint32_t bit)
{
    if (atomic_load(&seg->states[c]) != CHUNK_USED || seg->chunks[c].bin != BIN_OBJECT || !bit_is_set(&seg->chunks[c], bit))
        return 0;
    uint64_t offset = seg->data_offset + (uint64_t)c * TM_CHUNK + bit * sizeof(struct tm_object);
    const struct tm_object *o = at(seg, offset);
    uint32_t owner = o->pool;
    /* What is not linked in its chain may be half made: object_find inside the operation tells. */
    if (owner >= TM_MAX_POOLS || (pool < TM_MAX_POOLS && owner != pool)
        || object_find(seg, owner, o->oid) != (uint32_t)(offset / 128))
        return 0;
    return (uint32_t)(offset / 128);
}

/* Do `act` to each object of `pool` (TM_MAX_POOLS: of any) in chunk `c`, in an operation of its own; sum of results. The serial
 * is compared when the object is found: between two operations the number may become another pool's. */
static unsigned each_object(struct tm_ctx *ctx, uint32_t c, uint32_t pool, uint32_t serial,
                            unsigned (*act)(struct tm_ctx *ctx, uint32_t ref, uint32_t arg), uint32_t arg)
{
    struct tm_segment *seg = ctx->seg;
    unsigned sum = 0;
    for (uint32_t bit = 0; bit < TM_CHUNK / sizeof(struct tm_object); bit++) {
        if (atomic_load(&seg->states[c]) != CHUNK_USED || seg->chunks[c].bin != BIN_OBJECT)
            break;
        if (!bit_is_set(&seg->chunks[c], bit))
            continue;
        KP(59);
        op_begin(ctx);
        uint32_t ref = object_at(seg, pool, c, bit);
        if (ref && (pool == TM_MAX_POOLS || atomic_load(&seg->pools[pool].serial) == serial || MUTANT(36)))
            sum += act(ctx, ref, arg);
        op_end(ctx);
    }
    return sum;
}

static unsigned kill_one(struct tm_ctx *ctx, uint32_t ref, uint32_t arg)
{
    (void)arg;
    return object_kill(ctx, ref);
}

static unsigned kill_if_forgotten(struct tm_ctx *ctx, uint32_t ref, uint32_t arg)
{
    struct tm_object *o = meta_at(ctx->seg, ref);
    struct walk w = {.ctx = ctx, .pool = o->pool};
    (void)arg;
    return walk_slots(&w, o, slot_is_forgotten) && object_kill(ctx, ref);
}

static unsigned drop_one(struct tm_ctx *ctx, uint32_t ref, uint32_t user)
{
    struct tm_object *o = meta_at(ctx->seg, ref);
    if (user && atomic_load(&o->user) != user)
        return 0;
    int64_t found = object_flush(ctx, o);
    count(ctx->seg, o->pool, C_DROPPED, (uint64_t)found);
    atomic_fetch_sub_explicit(&ctx->seg->pools[o->pool].counters[C_FLUSHED], (uint64_t)found, memory_order_relaxed);
    return 1;
}

void pool_drop(struct tm_ctx *ctx, uint32_t pool, uint32_t serial, uint32_t user)
{
    for (uint32_t c = 0; c < ctx->seg->nchunks; c++)
        atomic_fetch_add(&ctx->seg->super->emptied, each_object(ctx, c, pool, serial, drop_one, user));
}

static bool unmark_slot(struct walk *w, slot_t *slot)
{
    uint64_t word = atomic_load(slot);
    (void)w;
    for (;;) {
        uint64_t clean = slot_type(word) == SLOT_EMPTY ? word & ~SLOT_VALUE : word & ~SLOT_FREQ;
        if (clean == word || slot_type(word) == SLOT_DEAD || atomic_compare_exchange_weak(slot, &word, clean))
            return true;
    }
}

static unsigned unmark_one(struct tm_ctx *ctx, uint32_t ref, uint32_t arg)
{
    struct tm_object *o = meta_at(ctx->seg, ref);
    struct walk w = {.ctx = ctx, .pool = o->pool};
    (void)arg;
    walk_slots(&w, o, unmark_slot);
    return 0;
}

void pool_unmark(struct tm_ctx *ctx, uint32_t pool, uint32_t serial)
{
    for (uint32_t c = 0; c < ctx->seg->nchunks; c++)
        each_object(ctx, c, pool, serial, unmark_one, 0);
}

enum { CHUNKS_AT_ONCE = 64 };

unsigned object_reap_empty(struct tm_ctx *ctx, unsigned most)
{
    struct tm_segment *seg = ctx->seg;
    unsigned doomed = 0, looked = 0;
    for (uint32_t i = 0; i < seg->nchunks && doomed < most; i++) {
        if (looked == CHUNKS_AT_ONCE) { /* the rest next time */
            look_for_empty(seg);
            break;
        }
        uint32_t c = atomic_fetch_add(&seg->super->sweep, 1) % seg->nchunks;
        looked += atomic_load(&seg->states[c]) == CHUNK_USED && seg->chunks[c].bin == BIN_OBJECT;
        doomed += each_object(ctx, c, TM_MAX_POOLS, 0, kill_if_forgotten, 0);
    }
    object_finish(ctx);
    return doomed;
}

/* Is an object of `pool` still linked, whoever destroys it? */
static bool pool_has_objects(struct tm_ctx *ctx, uint32_t pool)
{
    struct tm_segment *seg = ctx->seg;
    bool found = false;
    op_begin(ctx);
    for (uint32_t b = 0; b < seg->super->nbuckets && !found; b++)
        for (uint32_t ref = atomic_load(&seg->buckets[b]); ref && !found;) {
            struct tm_object *o = meta_at(seg, ref);
            found = o->pool == pool;
            ref = atomic_load(&o->next);
        }
    op_end(ctx);
    return found;
}

bool pool_sweep(struct tm_ctx *ctx, uint32_t pool, uint32_t serial)
{
    for (uint32_t c = 0; c < ctx->seg->nchunks; c++)
        if (each_object(ctx, c, pool, serial, kill_one, 0) && !object_finish(ctx))
            return false;
    /* Another thread may be at some object of it; the pool's number must not be used again before it is done. */
    return object_finish(ctx) && !pool_has_objects(ctx, pool) && grace(ctx, 1000);
}
