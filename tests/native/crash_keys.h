/* What the witness of the crash test knows, and every operation that a thread makes under its eyes. */
#ifndef CRASH_KEYS_H
#define CRASH_KEYS_H

#include "witness.h"

#include <signal.h>
#include <stdarg.h>
#include <unistd.h>

enum { KEYS = 192, MAX_SLOTS = 16, CONTENDED = 24, POINTS = 130, TINY_OBJECTS = 24 };
enum { NONE, PUT, FLUSH, TAKE, FLUSH_OBJECT };
enum { PERSISTENT, TAKEN, EPHEMERAL, NPOOLS }; /* TAKEN: persistent with exclusive gets */

struct key { /* page of one thread, in one of its pools */
    _Atomic uint64_t acked;   /* version stored; 0 absent */
    _Atomic uint64_t pending; /* version being put */
    _Atomic uint32_t op;      /* in flight */
};

struct slot { /* a logical thread: one successor after the other works here */
    struct key keys[NPOOLS][KEYS];
    _Atomic uint64_t version;
    _Atomic uint32_t flushing; /* FLUSH_OBJECT in flight: 1 + pool * 1000 + object */
    _Atomic uint64_t progress;
    uint32_t pools[NPOOLS], serials[NPOOLS];
};

struct shared {
    struct slot slots[MAX_SLOTS];
    _Atomic uint64_t contended_version;
    _Atomic uint32_t failed;
    _Atomic uint64_t refused, excused, puts, gets, hits, flushes, objects;
    _Atomic uint32_t arm[MAX_SLOTS];   /* kill point of each worker process, 0 none */
    _Atomic uint32_t count[MAX_SLOTS]; /* times to pass it first */
    _Atomic uint32_t hits_of[POINTS];
    uint32_t contended_pool, contended_serial, contended_epool, contended_eserial;
};

static struct shared *shared;
static struct options {
    const char *path;
    unsigned kills, memory, keep, trim, points, point, workers, threads, twins, packs;
    uint64_t seed;
} opt = {NULL, 500, 24, 1, 1, 1, 0, 3, 2, 0, 0, 1};
static uint32_t me; /* index of this worker process */

void kill_point(int n)
{
    uint32_t armed = atomic_load_explicit(&shared->arm[me], memory_order_relaxed);
    if (armed != (uint32_t)n || atomic_fetch_sub(&shared->count[me], 1) != 1)
        return;
    atomic_fetch_add(&shared->hits_of[n], 1);
    kill(getpid(), SIGKILL);
    pause();
}

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAIL ");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    atomic_store(&shared->failed, 1);
}

/* Keys are spread over objects of several sizes, so that every kind of leaf and node is made and freed. */
static void place(uint32_t slot, uint32_t k, uint8_t oid[TM_OID], uint32_t *index)
{
    static const uint32_t first[] = {0, 12, 60, 500, 4090, 600000};
    uint32_t object = k / (KEYS / TINY_OBJECTS), within = k % (KEYS / TINY_OBJECTS);
    oid_make(oid, 1000 * (slot + 1) + object);
    *index = first[object % 6] + within;
}

static uint64_t key_id(uint32_t slot, uint32_t pool, uint32_t k) { return 1 + ((slot * NPOOLS + pool) * KEYS + k); }

/* What version of a key is. With twins it is one of a few pages, so that many keys have equal ones, and an old version is
 * told from the new one nearly always. With packs neighbours have much in common. */
static void content_make(uint8_t *page, uint64_t id, uint64_t version)
{
    if (opt.twins && (id - 1) / KEYS % NPOOLS == EPHEMERAL)
        page_make(page, 1, version % 5); /* there are few of them */
    else if (opt.twins)
        page_make(page, 1 + id % 7, version % 13);
    else if (opt.packs && version % 8) { /* much as its neighbours are */
        uint64_t own[24] = {id, version};
        for (unsigned i = 2; i < 24; i++)
            own[i] = mix(id * 1000003 + version + i);
        page_make(page, 1 + id / 16, 3);
        memcpy(page, own, sizeof own);
    }
    else
        page_make(page, id, version);
}

static bool content_is(const uint8_t *page, uint64_t id, uint64_t version)
{
    uint8_t want[TM_PAGE];
    content_make(want, id, version);
    return memcmp(page, want, TM_PAGE) == 0;
}

static struct tm_handle handle(struct tm_segment *seg, const struct slot *s, uint32_t pool)
{
    return (struct tm_handle){seg, s->pools[pool], s->serials[pool]};
}

static void done(struct key *key, uint64_t acked)
{
    atomic_store(&key->acked, acked);
    atomic_store(&key->pending, 0);
    atomic_store(&key->op, NONE);
}

/* What a page holds now: 0 absent, 1 the acknowledged version, 2 the pending one, -1 neither. */
static int look(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct slot *s = &shared->slots[slot];
    struct key *key = &s->keys[pool][k];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID], page[TM_PAGE];
    uint32_t index;
    place(slot, k, oid, &index);
    int64_t rc = tm_get(&h, oid, index, page, 1);
    if (rc == 0)
        return 0;
    if (rc < 0) {
        fail("slot %u pool %u key %u: get says %lld", slot, pool, k, (long long)rc);
        return -1;
    }
    if (atomic_load(&key->pending) && content_is(page, key_id(slot, pool, k), atomic_load(&key->pending)))
        return 2;
    if (atomic_load(&key->acked) && content_is(page, key_id(slot, pool, k), atomic_load(&key->acked)))
        return 1;
    uint64_t words[2];
    memcpy(words, page, sizeof words);
    fail("slot %u pool %u key %u (id %llu): found id %llu version %llu, acked %llu pending %llu", slot, pool, k,
         (unsigned long long)key_id(slot, pool, k), (unsigned long long)words[0], (unsigned long long)words[1],
         (unsigned long long)key->acked, (unsigned long long)key->pending);
    return -1;
}

/* Settle what was in flight when this slot's thread was killed, before anything on those keys changes. */
static void resolve(struct tm_segment *seg, uint32_t slot)
{
    struct slot *s = &shared->slots[slot];
    uint32_t flushing = atomic_load(&s->flushing);
    for (uint32_t pool = 0; pool < NPOOLS; pool++)
        for (uint32_t k = 0; k < KEYS; k++) {
            struct key *key = &s->keys[pool][k];
            uint32_t op = atomic_load(&key->op);
            bool object = flushing && (flushing - 1) / 1000 == pool && (flushing - 1) % 1000 == k / (KEYS / TINY_OBJECTS);
            if (op == NONE && !object)
                continue;
            uint64_t acked = atomic_load(&key->acked), pending = atomic_load(&key->pending);
            if (pool == TAKEN) /* looking takes it out, and we may be killed before that is noted */
                atomic_store(&key->op, TAKE);
            int found = look(seg, slot, pool, k);
            if (found == 0 && acked && op == PUT && pool != EPHEMERAL) {
                /* Only a refused put may remove the old page, and only when asked to. */
                if (opt.keep)
                    fail("slot %u pool %u key %u: lost in a put", slot, pool, k);
                else
                    atomic_fetch_add(&shared->excused, 1);
            }
            if (found == 0 || pool == TAKEN)
                done(key, 0);
            else
                done(key, found == 2 ? pending : acked);
        }
    atomic_store(&s->flushing, 0);
}

static void do_put(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct slot *s = &shared->slots[slot];
    struct key *key = &s->keys[pool][k];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID], page[TM_PAGE];
    uint32_t index;
    uint64_t version = atomic_fetch_add(&s->version, 1) + 1;
    place(slot, k, oid, &index);
    content_make(page, key_id(slot, pool, k), version);
    atomic_store(&key->pending, version);
    atomic_store(&key->op, PUT);
    int64_t rc = tm_put(&h, oid, index, page, 1, opt.keep && pool != EPHEMERAL);
    if (rc < 0)
        fail("slot %u pool %u key %u: put says %lld", slot, pool, k, (long long)rc);
    atomic_fetch_add(rc ? &shared->puts : &shared->refused, 1);
    done(key, rc == 1 ? version : opt.keep && pool != EPHEMERAL ? atomic_load(&key->acked) : 0);
}

static void do_get(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct key *key = &shared->slots[slot].keys[pool][k];
    uint64_t acked = atomic_load(&key->acked);
    if (pool == TAKEN)
        atomic_store(&key->op, TAKE);
    int found = look(seg, slot, pool, k);
    atomic_fetch_add(&shared->gets, 1);
    atomic_fetch_add(&shared->hits, found == 1);
    if (found == 0 && acked && pool != EPHEMERAL)
        fail("slot %u pool %u key %u: lost version %llu", slot, pool, k, (unsigned long long)acked);
    if (found == 0 || pool == TAKEN)
        done(key, 0); /* an ephemeral page that missed must go on missing */
}

static void do_flush(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct slot *s = &shared->slots[slot];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID];
    uint32_t index;
    place(slot, k, oid, &index);
    atomic_store(&s->keys[pool][k].op, FLUSH);
    int64_t rc = tm_flush(&h, oid, index, 1);
    if (rc < 0 || (pool != EPHEMERAL && rc != (atomic_load(&s->keys[pool][k].acked) != 0)))
        fail("slot %u pool %u key %u: flush says %lld", slot, pool, k, (long long)rc);
    atomic_fetch_add(&shared->flushes, 1);
    done(&s->keys[pool][k], 0);
}

static void do_flush_object(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t object)
{
    struct slot *s = &shared->slots[slot];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID];
    uint32_t index, first = object * (KEYS / TINY_OBJECTS);
    place(slot, first, oid, &index);
    atomic_store(&s->flushing, 1 + pool * 1000 + object);
    if (tm_flush_object(&h, oid) < 0)
        fail("slot %u pool %u: flush of object %u", slot, pool, object);
    atomic_fetch_add(&shared->objects, 1);
    for (uint32_t k = first; k < first + KEYS / TINY_OBJECTS; k++)
        done(&s->keys[pool][k], 0);
    atomic_store(&s->flushing, 0);
}

/* Keys that everybody writes: no order is promised, but what is read was put whole, and once. */
static void do_contended(struct tm_segment *seg, uint64_t *rng)
{
    bool ephemeral = next_random(rng) % 3 == 0;
    struct tm_handle h = {seg, ephemeral ? shared->contended_epool : shared->contended_pool,
                          ephemeral ? shared->contended_eserial : shared->contended_serial};
    uint8_t oid[TM_OID], page[TM_PAGE];
    uint64_t r = next_random(rng), k = r % CONTENDED, key = 1000000 + k * 2 + ephemeral;
    oid_make(oid, 7 + k % 2);
    if (r >> 32 & 1) {
        page_make(page, key, atomic_fetch_add(&shared->contended_version, 1) + 1);
        if (tm_put(&h, oid, (uint32_t)k, page, 1, KEEP_OLD) < 0)
            fail("contended put");
    } else if (r >> 33 & 7) {
        uint64_t words[2];
        int64_t rc = tm_get(&h, oid, (uint32_t)k, page, 1);
        if (rc == 1) {
            memcpy(words, page, sizeof words);
            /* A same-filled page holds key and version in one word. */
            if (words[0] == words[1]) {
                if (words[0] >> 16 != (key & 0x7ffff))
                    fail("contended key %llu: a word of another key", (unsigned long long)key);
            } else if (words[0] != key || !page_is(page, key, words[1])) {
                fail("contended key %llu: a page that was never put", (unsigned long long)key);
            }
        } else if (rc < 0) {
            fail("contended get says %lld", (long long)rc);
        }
    } else {
        tm_flush(&h, oid, (uint32_t)k, 1);
    }
}

#endif
