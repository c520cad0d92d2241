/* Check of all invariants (docs/design.md, I1..I13). Exact only while nobody else works on the segment. */
#include "tm.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct report {
    struct tm_segment *seg;
    struct tm_ctx *ctx;
    void (*say)(void *arg, const char *line);
    void *arg;
    uint8_t *seen; /* one bit per 128 bytes of the file: meta units that something refers to */
};

static void say(struct report *r, const char *format, ...)
{
    char line[256];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    r->say(r->arg, line);
}

/* I1: a meta unit is allocated, in a bin of its kind, and referred to once. */
static bool refer(struct report *r, uint32_t ref, uint32_t bin, const char *what)
{
    uint32_t c, bit;
    if (!meta_place(r->seg, ref, &c, &bit) || r->seg->chunks[c].bin != bin || !bit_is_set(&r->seg->chunks[c], bit)) {
        say(r, "I1: %s %u is not allocated in bin %u", what, ref, bin);
        return false;
    }
    if (r->seen[ref / 8] >> (ref % 8) & 1) {
        say(r, "I1: %s %u is referred to twice", what, ref);
        return false;
    }
    r->seen[ref / 8] |= (uint8_t)(1 << (ref % 8));
    return true;
}

struct sums {
    int64_t pages, fill, raw, tier, twin, packed, bytes, objects, nodes;
};

struct visit {
    struct report *r;
    uint32_t pool;
};

static bool check_unit(void *arg, unsigned kind, uint32_t ref, _Atomic uint32_t *parent, uint32_t first)
{
    struct visit *v = arg;
    uint32_t bin = kind == UNIT_NODE ? BIN_NODE : BIN_LEAF + v->pool * 3 + kind;
    (void)parent;
    (void)first;
    refer(v->r, ref, bin, kind == UNIT_NODE ? "node" : "leaf");
    return true;
}

/* I2: every object hangs in the chain of its hash, lives, and belongs to a live pool. */
static void check_objects(struct report *r, struct sums *sums)
{
    struct tm_segment *seg = r->seg;
    for (uint32_t b = 0; b < seg->super->nbuckets; b++)
        for (uint32_t ref = atomic_load(&seg->buckets[b]); ref;) {
            if (!refer(r, ref, BIN_OBJECT, "object"))
                break;
            struct tm_object *o = meta_at(seg, ref);
            struct visit v = {r, o->pool};
            if ((object_hash(o->pool, o->oid) & (seg->super->nbuckets - 1)) != b)
                say(r, "I2: object %u is in the wrong chain", ref);
            if (o->pool >= TM_MAX_POOLS || atomic_load(&seg->pools[o->pool].state) != 1)
                say(r, "I2: object %u belongs to no live pool", ref);
            else {
                object_visit(seg, o, check_unit, &v);
                sums[o->pool].objects++;
                sums[o->pool].nodes += object_units(seg, o);
            }
            if (atomic_load(&o->state) != 1)
                say(r, "I2: object %u is in state %u", ref, atomic_load(&o->state));
            ref = atomic_load(&o->next);
        }
}

/* I3: every allocated block is the one that its slot refers to, and sound. */
static void check_block(struct report *r, uint64_t block)
{
    struct tm_segment *seg = r->seg;
    const struct tm_block *b = block_at(seg, block);
    uint64_t word = atomic_load(&b->word), number = header_slot(word);
    int pool = slot_pool(seg, number);
    uint64_t slot = pool < 0 ? 0 : atomic_load((slot_t *)at(seg, number * 8));
    if (!slot_refers(slot, block)) {
        say(r, "I3: block %llu leaked (stamp %08x)", (unsigned long long)block, atomic_load(&b->stamp));
        return;
    }
    if (block_length(word) > TM_PAGE || b->checksum != block_checksum(b, word, atomic_load(&b->stamp)))
        say(r, "I3: block %llu of pool %d fails its checksum", (unsigned long long)block, pool);
    else if (block_kind(word) == BLOCK_PACK ? !pack_holds(r->ctx, b, 0)
                                            : !block_read(r->ctx, b, number, seg->size - block * 16, r->ctx->page))
        say(r, "I3: block %llu of pool %d passes its checksum and cannot be decoded", (unsigned long long)block, pool);
    if (seg->pools[pool].persistent != (seg->chunks[chunk_of(seg, block * 16)].bin < BIN_OBJECT))
        say(r, "I3: block %llu is in a bin of the wrong kind", (unsigned long long)block);
}


/* I4: every slot's block is allocated; only persistent pages are in a tier; a pool's sums are those of its slots. I12: a
 * twin's original is stored, or was evicted and nothing has taken its place. I13: a page's pack is there, and has it. */
static void check_slots(struct report *r, uint32_t c, uint32_t bit, struct sums *sums)
{
    struct tm_segment *seg = r->seg;
    uint32_t stride = bin_stride(seg->chunks[c].bin), pool = (seg->chunks[c].bin - BIN_LEAF) / 3u;
    slot_t *slots = at(seg, seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride);
    for (uint32_t i = 0; i < stride / 8; i++) {
        uint64_t word = atomic_load(&slots[i]);
        uint32_t bc, bb;
        if (slot_type(word) == SLOT_FILL) {
            sums[pool].pages++;
            sums[pool].fill++;
        } else if (slot_type(word) == SLOT_TIER) {
            sums[pool].pages++;
            sums[pool].tier++;
            if (!(word & SLOT_VALUE) || !seg->pools[pool].persistent)
                say(r, "I4: a slot of pool %u names location %llu", pool, (unsigned long long)(word & SLOT_VALUE));
        } else if (slot_type(word) == SLOT_TWIN) {
            const slot_t *original = twin_original(seg, pool, word);
            uint64_t named = original ? atomic_load(original) : 0;
            sums[pool].pages++;
            sums[pool].twin++;
            if (!slot_stored(named) && !original_is_evicted(seg, originals_of(seg, pool), named))
                say(r, "I12: a slot of pool %u names original %llu, which is not there", pool,
                    (unsigned long long)(word & SLOT_VALUE));
        } else if (slot_type(word) == SLOT_PACKED) {
            uint64_t pack = word & SLOT_VALUE, named = 0, number = slot_number(seg, &slots[i]);
            if (!is_originals(pool) && slot_pool(seg, pack) == (int)packs_of(pool))
                named = atomic_load((slot_t *)at(seg, pack * 8));
            sums[pool].pages++;
            sums[pool].packed++;
            if (slot_type(named) != SLOT_BLOCK || !block_place(seg, named & SLOT_VALUE, &bc, &bb)
                || !pack_holds(r->ctx, block_at(seg, named & SLOT_VALUE), number))
                say(r, "I13: a slot of pool %u names pack %llu, which does not have its page", pool, (unsigned long long)pack);
        } else if (slot_type(word) == SLOT_BLOCK) {
            if (!block_place(seg, word & SLOT_VALUE, &bc, &bb) || !bit_is_set(&seg->chunks[bc], bb)) {
                say(r, "I4: a slot of pool %u refers to block %llu, which is not allocated", pool,
                    (unsigned long long)(word & SLOT_VALUE));
                continue;
            }
            if (header_slot(atomic_load(&block_at(seg, word & SLOT_VALUE)->word)) != off(seg, &slots[i]) / 8)
                say(r, "I4: block %llu belongs to another slot", (unsigned long long)(word & SLOT_VALUE));
            uint32_t size = bin_stride(seg->chunks[bc].bin);
            sums[pool].pages++;
            sums[pool].bytes += size;
            sums[pool].raw += size == TM_STRIDE_RAW;
        } else if (slot_type(word) != SLOT_EMPTY) {
            say(r, "I4: a slot of pool %u has type %u", pool, slot_type(word));
        }
    }
}

/* I5: a chunk in use has its count of free units right, and is listed if and only if it has room. */
static void check_chunk(struct report *r, uint32_t c, struct sums *sums)
{
    struct tm_segment *seg = r->seg;
    const struct tm_chunk *d = &seg->chunks[c];
    uint32_t units = TM_CHUNK / bin_stride(d->bin), set = 0;
    uint64_t start = seg->data_offset + (uint64_t)c * TM_CHUNK;
    for (uint32_t bit = 0; bit < 512; bit++) {
        if (!bit_is_set(d, bit))
            continue;
        set++;
        uint64_t unit = start + (uint64_t)bit * bin_stride(d->bin);
        if (bit >= units)
            say(r, "I5: chunk %u has unit %u of %u", c, bit, units);
        else if (bin_is_block(d->bin))
            check_block(r, unit / 16);
        else if (!(r->seen[unit / 128 / 8] >> (unit / 128 % 8) & 1))
            say(r, "I1: unit %llu of bin %u leaked", (unsigned long long)(unit / 128), d->bin);
        else if (d->bin >= BIN_LEAF)
            check_slots(r, c, bit, sums);
    }
    if (d->nfree != units - set)
        say(r, "I5: chunk %u says %u free units and has %u", c, d->nfree, units - set);
    if (d->flags & CF_OWNED)
        say(r, "I5: chunk %u is still owned by thread %u", c, d->prev);
    if (!(d->flags & CF_LISTED) != !d->nfree)
        say(r, "I5: chunk %u with %u free units has flags %u", c, d->nfree, d->flags);
    if (bin_is_ephemeral(d->bin) != (d->queued != 0))
        say(r, "I6: chunk %u of bin %u: queued is %u", c, d->bin, d->queued);
}

/* I6: lists and queues hold exactly the chunks that they should. */
static void check_lists(struct report *r)
{
    struct tm_segment *seg = r->seg;
    struct tm_super *s = seg->super;
    uint32_t counted[4] = {0}, n = 0;
    for (uint32_t c = 0; c < seg->nchunks; c++)
        counted[atomic_load(&seg->states[c]) & 3]++;
    for (uint32_t c = s->ret_head; c && n <= seg->nchunks; c = seg->chunks[c - 1].next, n++)
        if (atomic_load(&seg->states[c - 1]) != CHUNK_RET)
            say(r, "I6: chunk %u in the ret list has state %u", c - 1, atomic_load(&seg->states[c - 1]));
    if (n != counted[CHUNK_RET] || n != atomic_load(&s->nret))
        say(r, "I6: %u chunks in the ret list, %u in that state, %u counted", n, counted[CHUNK_RET], s->nret);
    n = 0;
    for (uint32_t c = s->free_head; c && n <= seg->nchunks; c = seg->chunks[c - 1].next)
        n++;
    if (n != s->nfree || n + (seg->nchunks - s->fresh) != counted[CHUNK_FREE])
        say(r, "I6: %u + %u free chunks listed, %u in that state", n, seg->nchunks - s->fresh, counted[CHUNK_FREE]);
    if (counted[CHUNK_BUSY] || atomic_load(&s->nused) != counted[CHUNK_USED])
        say(r, "I6: %u chunks busy, %u used, %u counted", counted[CHUNK_BUSY], counted[CHUNK_USED], s->nused);
    for (uint32_t bin = 0; bin < TM_NBINS; bin++) {
        if (!atomic_load(&seg->bins[bin].ready))
            continue;
        n = 0;
        uint32_t room = 0;
        for (uint32_t c = bin_lock(seg, bin)->partial; c && n <= seg->nchunks; c = seg->chunks[c - 1].next, n++) {
            room += seg->chunks[c - 1].nfree;
            if (seg->chunks[c - 1].bin != bin || atomic_load(&seg->states[c - 1]) != CHUNK_USED)
                say(r, "I6: chunk %u is in the list of bin %u", c - 1, bin);
        }
        if (room != atomic_load(&seg->bins[bin].room))
            say(r, "I6: bin %u has room for %u, says %u", bin, room, atomic_load(&seg->bins[bin].room));
        lock_drop(&seg->bins[bin].lock);
        uint32_t listed = 0;
        for (uint32_t c = 0; n && c < seg->nchunks; c++)
            listed += atomic_load(&seg->states[c]) == CHUNK_USED && seg->chunks[c].bin == bin
                      && (seg->chunks[c].flags & CF_LISTED);
        if (n != listed)
            say(r, "I6: %u chunks in the list of bin %u, %u flagged", n, bin, listed);
    }
    uint32_t index[TM_MAX_CLIENTS] = {0};
    for (uint32_t c = 0; c < seg->nchunks; c++)
        if (atomic_load(&seg->states[c]) == CHUNK_USED && seg->chunks[c].bin >= BIN_LEAF
            && (seg->chunks[c].bin - BIN_LEAF) / 3u < TM_FIRST_SHARED)
            index[(seg->chunks[c].bin - BIN_LEAF) / 3u / TM_CLIENT_POOLS]++;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        if (index[i] != atomic_load(&seg->clients[i].index_chunks))
            say(r, "I6: client %u has %u chunks of index, says %u", i, index[i], seg->clients[i].index_chunks);
    for (uint32_t i = 0; i < TM_NACCOUNTS; i++)
        for (unsigned q = 0; q < 2; q++) {
            n = 0;
            for (uint32_t c = seg->clients[i].queues[q].head; c && n <= seg->nchunks; c = seg->chunks[c - 1].qnext)
                n++;
            if (n != atomic_load(&seg->clients[i].queues[q].length))
                say(r, "I6: queue %u of account %u has %u chunks, says %u", q, i, n,
                    atomic_load(&seg->clients[i].queues[q].length));
        }
}

/* I10: a shared pool has exactly the sharers that are members, and one of them owns it. */
static void check_shares(struct report *r)
{
    struct tm_segment *seg = r->seg;
    uint64_t members[TM_MAX_SHARED] = {0};
    uint32_t floors = 0;
    for (uint32_t p = 0; p < TM_FIRST_SHARED; p++) {
        uint32_t link = seg->pools[p].link;
        if (atomic_load(&seg->pools[p].state) == LIVE && link)
            members[link - TM_FIRST_SHARED] |= UINT64_C(1) << p / TM_CLIENT_POOLS;
    }
    for (uint32_t i = 0; i < TM_MAX_SHARED; i++) {
        const struct tm_pool *p = &seg->pools[TM_FIRST_SHARED + i];
        uint64_t sharers = atomic_load(&p->state) == LIVE ? atomic_load(&p->sharers) : 0;
        if (sharers != members[i])
            say(r, "I10: shared pool %u has sharers %llx and members %llx", i, (unsigned long long)sharers,
                (unsigned long long)members[i]);
        if (sharers && !(sharers >> atomic_load(&p->owner) & 1))
            say(r, "I10: shared pool %u belongs to client %u, which does not share it", i, atomic_load(&p->owner));
    }
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        floors += atomic_load(&seg->clients[i].state) != FREE && atomic_load(&seg->clients[i].floor_bytes);
    if (floors != atomic_load(&seg->super->nfloors))
        say(r, "I10: %u clients have floors, %u counted", floors, atomic_load(&seg->super->nfloors));
}

static int compare_locations(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* I11: no two slots of a client name the same location. */
static void check_locations(struct report *r, struct tm_ctx *ctx, uint32_t client)
{
    uint64_t most = tm_live(ctx, client, NULL, 0);
    uint64_t *all = most ? malloc(most * sizeof *all) : NULL;
    uint64_t n = all ? tm_live(ctx, client, all, most) : 0;
    n = n < most ? n : most;
    if (all)
        qsort(all, n, sizeof *all, compare_locations);
    for (uint64_t i = 1; i < n; i++)
        if (all[i] == all[i - 1])
            say(r, "I11: two slots of client %u name location %llu", client, (unsigned long long)all[i]);
    free(all);
}

/* I7: sums of pools and clients. I8: no intent of anybody stands. I9: no lock is held (tables' locks are taken). */
static void check_sums(struct report *r, const struct sums *sums)
{
    struct tm_segment *seg = r->seg;
    int64_t used[TM_NACCOUNTS] = {0}, ephemeral[TM_NACCOUNTS] = {0};
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        const struct tm_pool *pool = &seg->pools[p];
        used[account_of(p)] += sums[p].bytes;
        ephemeral[account_of(p)] += pool->persistent || is_originals(p) ? 0 : sums[p].pages;
        if (atomic_load(&pool->state) != LIVE)
            continue;
        if (pool->pages != sums[p].pages || pool->fill_pages != sums[p].fill || pool->raw_pages != sums[p].raw
            || pool->tier_pages != sums[p].tier || pool->twin_pages != sums[p].twin
            || pool->packed_pages != sums[p].packed || pool->bytes != sums[p].bytes)
            say(r, "I7: pool %u counts %lld pages of %lld bytes and has %lld of %lld", p, (long long)pool->pages,
                (long long)pool->bytes, (long long)sums[p].pages, (long long)sums[p].bytes);
        if (pool->objects != sums[p].objects || pool->nodes != sums[p].nodes)
            say(r, "I7: pool %u counts %lld objects with %lld nodes and has %lld with %lld", p, (long long)pool->objects,
                (long long)pool->nodes, (long long)sums[p].objects, (long long)sums[p].nodes);
    }
    for (uint32_t a = 0; a < TM_NACCOUNTS; a++) {
        const struct tm_client *c = &seg->clients[a];
        bool live = a < TM_MAX_CLIENTS ? atomic_load(&c->state) == LIVE || atomic_load(&c->state) == STAGED
                                       : atomic_load(&seg->pools[TM_FIRST_SHARED + a - TM_MAX_CLIENTS].state) == LIVE;
        if (live && (c->used_bytes != used[a] || c->ephemeral != ephemeral[a]))
            say(r, "I7: account %u counts %lld bytes and %lld ephemeral pages and has %lld and %lld", a,
                (long long)c->used_bytes, (long long)c->ephemeral, (long long)used[a], (long long)ephemeral[a]);
    }
    check_shares(r);
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++) {
        const struct tm_thread *t = &seg->threads[i];
        if (t->new_block || t->old_block || t->chunk || t->drain || t->meta_new || t->meta_old || t->dying || t->doomed)
            say(r, "I8: thread %u of process %u has an intent standing", i, t->pid);
    }
}

void tm_check(struct tm_ctx *ctx, void (*report)(void *arg, const char *line), void *arg)
{
    struct report r = {ctx->seg, ctx, report, arg, calloc(1, ctx->seg->size / 128 / 8 + 1)};
    struct sums *sums = calloc(TM_MAX_POOLS, sizeof *sums);
    if (!r.seen || !sums) {
        say(&r, "no memory for the check");
    } else {
        chunks_lock(ctx->seg);
        chunks_unlock(ctx->seg);
        check_lists(&r);
        check_objects(&r, sums);
        for (uint32_t c = 0; c < ctx->seg->nchunks; c++)
            if (atomic_load(&ctx->seg->states[c]) == CHUNK_USED)
                check_chunk(&r, c, sums);
        check_sums(&r, sums);
        for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
            check_locations(&r, ctx, i);
        for (unsigned i = 0; i < TM_NSHARDS; i++) {
            lock_take(&ctx->seg->super->shards[i]);
            lock_drop(&ctx->seg->super->shards[i]);
        }
    }
    free(sums);
    free(r.seen);
}
