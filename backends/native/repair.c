/* Repair after a death: of a lock's holder (what the lock guards is derived anew), and of a thread (its intents).
 *
 * Everything here may be interrupted by the repairer's own death and begun again by another, so it derives and
 * never adjusts, and an intent is cleared only when nothing is left to do for it. While a thread is repaired, the
 * repairer acts as that thread (ctx->rec is the dead record), so that its own death leaves the same intents. */
#include "tm.h"

#include <string.h>

/* A meta unit whose intent stands while its bit is clear: the holder died between the two stores. Everybody else
 * makes both under this lock, so only the dead can look like this. */
static void drop_void_intents(struct tm_segment *seg, uint32_t bin)
{
    uint32_t n = atomic_load(&seg->super->nthreads), c, bit;
    for (uint32_t i = 0; i < n; i++) {
        struct tm_thread *rec = &seg->threads[i];
        uint32_t fresh = atomic_load(&rec->meta_new), old = atomic_load(&rec->meta_old);
        if (fresh && meta_place(seg, fresh, &c, &bit) && seg->chunks[c].bin == bin
            && !bit_is_set(&seg->chunks[c], bit))
            atomic_store(&rec->meta_new, 0);
        if (old && meta_place(seg, old, &c, &bit) && seg->chunks[c].bin == bin && !bit_is_set(&seg->chunks[c], bit))
            atomic_store(&rec->meta_old, 0);
    }
}

void repair_bin(struct tm_segment *seg, uint32_t bin)
{
    uint32_t units = TM_CHUNK / bin_stride(bin), head = 0, room = 0;
    if (!MUTANT(32))
        chunks_lock(seg); /* a chunk that its owner releases this moment may be another bin's before we write to it */
    for (uint32_t c = 0; c < seg->nchunks; c++) {
        struct tm_chunk *d = &seg->chunks[c];
        if (atomic_load(&seg->states[c]) != CHUNK_USED || d->bin != bin)
            continue;
        uint32_t set = 0;
        for (unsigned w = 0; w < 8; w++)
            set += (uint32_t)__builtin_popcountll(d->bitmap[w]);
        KP(19);
        if (!MUTANT(3))
            d->nfree = (uint16_t)(units - set);
        d->flags &= (uint16_t)~CF_LISTED;
        if ((d->flags & CF_OWNED) || !d->nfree)
            continue;
        d->flags |= CF_LISTED;
        d->prev = 0;
        d->next = head;
        if (head)
            seg->chunks[head - 1].prev = c + 1;
        head = c + 1;
        room += d->nfree;
    }
    drop_void_intents(seg, bin); /* nor may a chunk become this bin's between two looks at a living thread's intent */
    if (!MUTANT(32))
        chunks_unlock(seg);
    seg->bins[bin].partial = head;
    atomic_store(&seg->bins[bin].room, room);
}

void repair_chunks(struct tm_segment *seg)
{
    struct tm_super *s = seg->super;
    uint32_t nfree = 0, nret = 0, nused = 0;
    s->free_head = s->ret_head = s->fresh = 0;
    for (uint32_t i = 0; i < TM_NACCOUNTS; i++) {
        memset(seg->clients[i].queues, 0, sizeof seg->clients[i].queues);
        atomic_store(&seg->clients[i].index_chunks, 0);
    }
    for (uint32_t c = seg->nchunks; c-- > 0;) {
        struct tm_chunk *d = &seg->chunks[c];
        uint8_t state = atomic_load(&seg->states[c]);
        if (state != CHUNK_FREE && !s->fresh)
            s->fresh = c + 1;
        if (state == CHUNK_FREE && s->fresh) {
            d->next = s->free_head;
            s->free_head = c + 1;
            nfree++;
        } else if (state == CHUNK_RET) {
            d->next = s->ret_head;
            s->ret_head = c + 1;
            nret++;
        } else if (state == CHUNK_USED || state == CHUNK_BUSY) {
            nused++;
        }
        if (state == CHUNK_USED && d->bin >= BIN_LEAF && (d->bin - BIN_LEAF) / 3u < TM_FIRST_SHARED)
            seg->clients[(d->bin - BIN_LEAF) / 3u / TM_CLIENT_POOLS].index_chunks++;
        if (state != CHUNK_USED || !d->queued || !bin_is_ephemeral(d->bin)) {
            d->queued = 0;
            continue;
        }
        /* The order of a queue is only advice: after a death it is that of the chunks. */
        struct tm_queue *q = &seg->clients[bin_account(d->bin)].queues[bin_queue(d->bin)];
        d->qprev = 0;
        d->qnext = q->head;
        if (q->head)
            seg->chunks[q->head - 1].qprev = c + 1;
        else
            q->tail = c + 1;
        q->head = c + 1;
        q->length++;
    }
    s->nfree = nfree;
    atomic_store(&s->nret, nret);
    atomic_store(&s->nused, nused);
}

/* Take and drop the lock of a unit's bin, so that it is sound. False if the unit's chunk is not in use. */
static bool settle_bin(struct tm_segment *seg, uint64_t offset)
{
    if (!in_data(seg, offset) || atomic_load(&seg->states[chunk_of(seg, offset)]) != CHUNK_USED)
        return false;
    lock_drop(&bin_lock(seg, seg->chunks[chunk_of(seg, offset)].bin)->lock);
    return true;
}

/* Was the new unit `ref` linked? An object that was may have been condemned and unlinked by now (its state says
 * so); freed it cannot be, for its destroyer waits until the dead thread's operation is over, which is not before
 * this repair. The same wait keeps a leaf's parent as it is. */
static bool is_linked(struct tm_segment *seg, uint32_t ref, uint64_t parent)
{
    if (!parent)
        return false;
    if (!(parent & 1))
        return atomic_load((_Atomic uint32_t *)at(seg, parent)) == ref;
    struct tm_object *o = meta_at(seg, ref);
    struct tm_lock *shard = shard_of(seg, object_hash(o->pool, o->oid));
    lock_take(shard);
    bool linked = atomic_load(&o->state) != 1 || object_find(seg, o->pool, o->oid) == ref;
    lock_drop(shard);
    return linked;
}

static void repair_meta(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_thread *rec = ctx->rec;
    uint32_t ref = atomic_load(&rec->meta_old);
    uint64_t parent = atomic_load(&rec->meta_parent);
    if (ref && settle_bin(seg, (uint64_t)ref * 128) && atomic_load(&rec->meta_old)) {
        if (atomic_load(&rec->doomed) == ref) /* the object itself: off the list before it is gone */
            atomic_store(&rec->doomed, ((struct tm_object *)meta_at(seg, ref))->batch);
        else if (parent && atomic_load((_Atomic uint32_t *)at(seg, parent)) == ref)
            atomic_store((_Atomic uint32_t *)at(seg, parent), 0);
        meta_free(ctx, ref);
    }
    ref = atomic_load(&rec->meta_new);
    if (ref && settle_bin(seg, (uint64_t)ref * 128) && atomic_load(&rec->meta_new) && !is_linked(seg, ref, parent))
        meta_free_new(ctx);
    atomic_store(&rec->meta_old, 0);
    atomic_store(&rec->meta_new, 0);
}

/* Does a living thread mean to free this block? Then it will, or will find that it lost the race for the slot. One that
 * is being repaired lives in this sense: its repairer sees the same of ours, and one of the two comes again first. */
static bool wanted_by_living(struct tm_ctx *ctx, uint64_t block)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t n = atomic_load(&seg->super->nthreads);
    for (uint32_t i = 0; i < n; i++) {
        struct tm_thread *rec = &seg->threads[i];
        if (rec == ctx->rec || atomic_load(&rec->old_block) != block)
            continue;
        int life = lock_try_life(&rec->life);
        if (life == LIFE_TAKEN)
            return true;
        if (life == LIFE_DEAD) /* nobody else is told */
            note_death(seg);
        lock_drop(&rec->life);
    }
    return false;
}

/* Free `block`, of intent old_block or new_block, if it still is the one of that stamp and its slot does not hold it: in one
 * hold of the lock, for the repairer of another thread may mean the same block. False: decide later. */
static bool repair_block(struct tm_ctx *ctx, bool old)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_thread *rec = ctx->rec;
    uint64_t block = atomic_load(old ? &rec->old_block : &rec->new_block);
    uint32_t stamp = atomic_load(old ? &rec->old_stamp : &rec->new_stamp), c, bit;
    if (!block || !settle_bin(seg, block * 16) || !block_place(seg, block, &c, &bit))
        return true;
    struct tm_bin *b = bin_lock(seg, seg->chunks[c].bin);
    struct tm_block *header = block_at(seg, block);
    bool ours = block_place(seg, block, &c, &bit) && bit_is_set(&seg->chunks[c], bit)
                && (atomic_load(&header->stamp) == stamp || MUTANT(2));
    bool linked = false, wanted = false;
    if (ours) {
        uint64_t number = header_slot(atomic_load(&header->word));
        if (slot_pool(seg, number) >= 0) {
            linked = slot_refers(atomic_load((slot_t *)at(seg, number * 8)), block);
        }
        wanted = !linked && wanted_by_living(ctx, block) && !MUTANT(4);
    }
    if (MUTANT(31))
        lock_drop(&b->lock);
    KP(49);
    if (MUTANT(31))
        bin_lock(seg, seg->chunks[c].bin);
    if (ours && !linked && !wanted)
        block_free_locked(ctx, b, old);
    else
        lock_drop(&b->lock);
    return !wanted;
}

/* Does the thread that is repaired own chunk `c`? */
static bool is_owner(struct tm_ctx *ctx, uint32_t c)
{
    struct tm_segment *seg = ctx->seg;
    bool owned;
    uint32_t owner, bin = seg->chunks[c].bin;
    if (atomic_load(&seg->states[c]) != CHUNK_USED)
        return false;
    struct tm_bin *b = bin_lock(seg, bin);
    if (MUTANT(30))
        lock_drop(&b->lock);
    bool his = chunk_is_owned(seg, c, bin, &owned, &owner) && owned && owner == ctx->index;
    if (!MUTANT(30))
        lock_drop(&b->lock);
    return his;
}

/* Settle the chunks that it owns. */
static void repair_chunk_intents(struct tm_ctx *ctx)
{
    for (unsigned i = 0; i < 2; i++) {
        _Atomic uint32_t *intent = i ? &ctx->rec->drain : &ctx->rec->chunk;
        uint32_t c = atomic_load(intent);
        if (!c--)
            continue;
        if (is_owner(ctx, c))
            chunk_settle(ctx, c);
        KP(33);
        if (i)
            chunk_requeue(ctx, c);
        atomic_store(intent, 0);
    }
}

bool repair_thread(struct tm_ctx *ctx, uint32_t index)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_thread *saved = ctx->rec, *rec = &seg->threads[index];
    uint32_t saved_index = ctx->index;
    bool done = true;

    ctx->rec = rec;
    ctx->index = index;
    if (!MUTANT(38)) /* first, for what is freed below may empty a chunk, which needs the intent */
        repair_chunk_intents(ctx);
    repair_meta(ctx);
    if (!MUTANT(1)) {
        KP(30);
        done &= repair_block(ctx, false);
        KP(31);
        done &= repair_block(ctx, true);
        KP(32);
    }
    if (done) {
        atomic_store(&rec->new_block, 0);
        atomic_store(&rec->old_block, 0);
    }
    if (MUTANT(38))
        repair_chunk_intents(ctx);
    /* What is left then waits for grace periods: the dead thread's operation ends first, or two repairers would each
     * wait for the record that the other one holds. */
    if (done && !MUTANT(27))
        object_repair(ctx); /* may take off the sums again what was taken off: who recounts waits for that */
    if (done && (atomic_load(&rec->op) & 1))
        atomic_fetch_add(&rec->op, 1);
    if (done && MUTANT(27))
        object_repair(ctx);
    fetching_end(rec);
    done = done && chunk_free_busy(ctx, index) && object_finish(ctx);
    ctx->rec = saved;
    ctx->index = saved_index;
    return done;
}

struct tally {
    int64_t pages, fill, raw, tier, twin, packed, bytes, objects, nodes;
};

/* The linked objects of all pools, and their index. */
static void tally_objects(struct tm_segment *seg, struct tally *found)
{
    for (uint32_t b = 0; b < seg->super->nbuckets; b++)
        for (uint32_t ref = atomic_load(&seg->buckets[b]); ref;) {
            struct tm_object *o = meta_at(seg, ref);
            if (o->pool < TM_MAX_POOLS) {
                found[o->pool].objects++;
                found[o->pool].nodes += object_units(seg, o);
            }
            ref = atomic_load(&o->next);
        }
}

/* What the slots of a pool say. */
static struct tally tally_pool(struct tm_ctx *ctx, uint32_t pool)
{
    struct tm_segment *seg = ctx->seg;
    struct tally t = {0};
    uint32_t first = BIN_LEAF + pool * 3;
    for (uint32_t c = 0; c < seg->nchunks; c++) {
        struct tm_chunk *d = &seg->chunks[c];
        if (atomic_load(&seg->states[c]) != CHUNK_USED || d->bin < first || d->bin >= first + 3)
            continue;
        op_begin(ctx); /* from here on it is not punched */
        if (atomic_load(&seg->states[c]) != CHUNK_USED || d->bin < first || d->bin >= first + 3) {
            op_end(ctx);
            continue;
        }
        uint32_t stride = bin_stride(d->bin);
        for (uint32_t bit = 0; bit < TM_CHUNK / stride; bit++) {
            if (!bit_is_set(d, bit))
                continue;
            slot_t *slots = at(seg, seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride);
            for (uint32_t i = 0; i < stride / 8; i++) {
                uint64_t word = atomic_load_explicit(&slots[i], memory_order_relaxed);
                unsigned type = slot_type(word);
                t.pages += slot_stored(word);
                t.tier += type == SLOT_TIER;
                t.twin += type == SLOT_TWIN;
                t.packed += type == SLOT_PACKED;
                t.fill += type == SLOT_FILL;
                if (type == SLOT_BLOCK) {
                    uint32_t bc, bb;
                    if (block_place(seg, word & SLOT_VALUE, &bc, &bb)) {
                        uint32_t size = bin_stride(seg->chunks[bc].bin);
                        t.bytes += size;
                        t.raw += size == TM_STRIDE_RAW;
                    }
                }
            }
        }
        op_end(ctx);
    }
    return t;
}

/* Grows with every change of what the sums sum up. Equal before and after means that nobody who lives has counted one,
 * that no pool or client came in the place of another, and that nobody corrected the sums. No part of it ever shrinks. */
static uint64_t commits(struct tm_segment *seg)
{
    uint64_t sum = !MUTANT(23) * atomic_load(&seg->super->recounts);
    uint32_t n = atomic_load(&seg->super->nthreads);
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++)
        sum += atomic_load(&seg->pools[p].serial);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        sum += atomic_load(&seg->clients[i].serial);
    for (uint32_t i = 0; i < n; i++)
        sum += atomic_load_explicit(&seg->threads[i].changes, memory_order_acquire);
    return sum;
}

struct sums {
    struct tally pools[TM_MAX_POOLS];
    int64_t used[TM_NACCOUNTS], ephemeral[TM_NACCOUNTS];
};

/* What is there. */
static void find(struct tm_ctx *ctx, struct sums *found)
{
    struct tm_segment *seg = ctx->seg;
    memset(found, 0, sizeof *found);
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++)
        if (atomic_load(&seg->pools[p].state))
            found->pools[p] = tally_pool(ctx, p);
    KP(34);
    op_begin(ctx); /* what is walked cannot be freed */
    tally_objects(seg, found->pools);
    op_end(ctx);
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        found->used[account_of(p)] += found->pools[p].bytes;
        found->ephemeral[account_of(p)] += seg->pools[p].persistent || is_originals(p) ? 0 : found->pools[p].pages;
    }
}

/* From what was found to what the sums lack of it. */
static void subtract_locked(struct tm_segment *seg, struct sums *lack)
{
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        const struct tm_pool *pool = &seg->pools[p];
        struct tally *t = &lack->pools[p];
        t->pages -= pool->pages;
        t->fill -= pool->fill_pages;
        t->raw -= pool->raw_pages;
        t->tier -= pool->tier_pages;
        t->twin -= pool->twin_pages;
        t->packed -= pool->packed_pages;
        t->bytes -= pool->bytes;
        t->objects -= pool->objects;
        t->nodes -= pool->nodes;
    }
    for (uint32_t a = 0; a < TM_NACCOUNTS; a++) {
        lack->used[a] -= seg->clients[a].used_bytes;
        lack->ephemeral[a] -= seg->clients[a].ephemeral;
    }
}

/* Operations that began meanwhile keep their count: the difference is added. */
static void add_locked(struct tm_segment *seg, const struct sums *lack)
{
    atomic_fetch_add(&seg->super->recounts, 1); /* first: who read the sums before, or dies here, is found out */
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        struct tm_pool *pool = &seg->pools[p];
        const struct tally *t = &lack->pools[p];
        if (!atomic_load(&pool->state))
            continue;
        KP(35);
        pool->pages += t->pages;
        pool->fill_pages += t->fill;
        pool->raw_pages += t->raw;
        pool->tier_pages += t->tier;
        pool->twin_pages += t->twin;
        pool->packed_pages += t->packed;
        pool->bytes += t->bytes;
        pool->objects += t->objects;
        pool->nodes += t->nodes;
    }
    for (uint32_t a = 0; a < TM_NACCOUNTS; a++) {
        struct tm_client *c = &seg->clients[a];
        if (a < TM_MAX_CLIENTS && !atomic_load(&c->state))
            continue;
        c->used_bytes += lack->used[a];
        c->ephemeral += lack->ephemeral[a];
    }
}

/* Compare what is there with the sums, and correct those. False: somebody changed something meanwhile. Each step is
 * where it is for a reason: docs/concurrency.md, "The sums". */
static bool try_recount(struct tm_ctx *ctx)
{
    static _Thread_local struct sums lack;
    struct tm_segment *seg = ctx->seg;
    uint64_t before = commits(seg);
    if (!grace(ctx, 100) || commits(seg) != before)
        return false;
    find(ctx, &lack);
    KP(37);
    struct tm_lock *lock = MUTANT(25) ? NULL : control_lock(seg);
    if (!MUTANT(24))
        subtract_locked(seg, &lack);
    if (lock)
        lock_drop(lock);
    bool still = grace(ctx, 100);
    KP(36);
    lock = control_lock(seg);
    if (MUTANT(16))
        lock_drop(lock);
    still = still && commits(seg) == before;
    if (MUTANT(24))
        subtract_locked(seg, &lack);
    if (still)
        add_locked(seg, &lack);
    if (!MUTANT(16))
        lock_drop(lock);
    return still;
}

void recount(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    static const unsigned tries = 3; /* under load they fail, and the next reaper tries again */
    for (unsigned i = 0; i < tries && atomic_load(&seg->super->recount); i++) {
        if (!MUTANT(15))
            atomic_store(&seg->super->recount, 0); /* first: a death from here on is seen by the next one */
        if (!try_recount(ctx))
            atomic_store(&seg->super->recount, 1);
        else if (MUTANT(15))
            atomic_store(&seg->super->recount, 0);
    }
}
