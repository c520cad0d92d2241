/* What the crash test does with whole clients: pools that come and go, shared pools, modes, floors, handoffs.
 *
 * Each slot has clients of its own for this, by name. Whatever a killed predecessor left, in whatever state, its
 * successor goes on with; what must hold is asserted on the way, and by the check of all invariants at the end. */
#ifndef CRASH_CLIENTS_H
#define CRASH_CLIENTS_H

#include "crash_keys.h"

/* The client `what` of this slot. False: the table is full of clients that die. */
static bool own_client(struct tm_ctx *ctx, const char *what, uint32_t slot, uint32_t *id, uint32_t *serial)
{
    char name[32];
    snprintf(name, sizeof name, "%s%u", what, slot);
    int rc = client_open(ctx, name, true, id, serial);
    if (rc != TM_OK && rc != TM_FULL)
        fail("client %s says %d", name, rc);
    return rc == TM_OK;
}

/* A pool of that client for this slot; false if all its numbers belong to pools that die. */
static bool own_pool(struct tm_segment *seg, uint32_t id, uint32_t serial, struct pool_wish wish, struct tm_handle *h)
{
    wish.id = -1;
    h->seg = seg;
    int rc = pool_new(ctx_get(seg), id, serial, &wish, &h->pool, &h->serial);
    if (rc != TM_OK && rc != TM_FULL)
        fail("pool of client %u says %d", id, rc);
    return rc == TM_OK;
}

static void drop_pools(struct tm_segment *seg, uint32_t id)
{
    for (uint32_t p = id * TM_CLIENT_POOLS; p < (id + 1) * TM_CLIENT_POOLS; p++)
        pool_destroy(ctx_get(seg), p, atomic_load(&seg->pools[p].serial));
}

/* Pools come and go; a successor destroys those that its predecessor left. */
static void do_pools(struct tm_segment *seg, uint32_t slot, uint64_t *rng)
{
    uint32_t id, serial;
    uint8_t oid[TM_OID], page[TM_PAGE], back[TM_PAGE];
    struct tm_handle h;
    if (!own_client(ctx_get(seg), "scratch", slot, &id, &serial))
        return;
    drop_pools(seg, id);
    if (!own_pool(seg, id, serial, (struct pool_wish){.persistent = next_random(rng) & 1}, &h))
        return;
    for (uint32_t i = 0; i < 20; i++) {
        oid_make(oid, i % 3);
        page_make(page, 77, i);
        int64_t put = tm_put(&h, oid, i * 40, page, 1, KEEP_NOTHING);
        if (put == 1 && tm_get(&h, oid, i * 40, back, 1) == 1 && memcmp(page, back, TM_PAGE) != 0)
            fail("scratch page differs");
    }
    if (next_random(rng) & 1)
        pool_destroy(ctx_get(seg), h.pool, h.serial);
    else
        client_destroy(ctx_get(seg), id, serial);
    oid_make(oid, 0);
    if (tm_get(&h, oid, 0, back, 1) != TM_NOPOOL)
        fail("a destroyed pool answers");
}

enum { SHARED_UUIDS = 3, SHARED_KEYS = 40 };

/* Join a shared pool, use it together with whoever else has joined, sometimes leave. */
static void do_shared(struct tm_segment *seg, uint32_t slot, uint64_t *rng)
{
    struct tm_ctx *ctx = ctx_get(seg);
    uint32_t id, serial, which = (uint32_t)(next_random(rng) % SHARED_UUIDS);
    uint8_t uuid[TM_UUID] = {(uint8_t)(which + 1)}, oid[TM_OID], page[TM_PAGE];
    struct tm_handle h = {.seg = seg};
    if (!own_client(ctx, "sharer", slot, &id, &serial))
        return;
    if (client_authorise(ctx, id, serial, uuid) != TM_OK)
        fail("authorise");
    struct pool_wish wish = {.uuid = uuid, .id = -1};
    int rc = pool_new(ctx, id, serial, &wish, &h.pool, &h.serial);
    if (rc == TM_TAKEN) { /* our predecessor had joined */
        for (h.pool = id * TM_CLIENT_POOLS; h.pool < (id + 1) * TM_CLIENT_POOLS; h.pool++) {
            const struct tm_pool *p = &seg->pools[h.pool];
            if (atomic_load(&p->state) == LIVE && p->link && memcmp(seg->pools[p->link].uuid, uuid, TM_UUID) == 0)
                break;
        }
        h.serial = atomic_load(&seg->pools[h.pool].serial);
        rc = h.pool < (id + 1) * TM_CLIENT_POOLS ? TM_OK : TM_TAKEN;
    }
    if (rc != TM_OK) {
        if (rc != TM_FULL)
            fail("joining says %d", rc);
        return;
    }
    for (unsigned i = 0; i < 20; i++) {
        uint64_t k = next_random(rng) % SHARED_KEYS, key = 3000000 + which * SHARED_KEYS + k, words[2];
        oid_make(oid, k % 5);
        if (next_random(rng) & 1) {
            page_make(page, key, atomic_fetch_add(&shared->contended_version, 1) + 1);
            rc = (int)tm_put(&h, oid, (uint32_t)k, page, 1, KEEP_NOTHING);
        } else if ((rc = (int)tm_get(&h, oid, (uint32_t)k, page, 1)) == 1) {
            memcpy(words, page, sizeof words);
            if (words[0] == words[1] ? words[0] >> 16 != (key & 0x7ffff) : words[0] != key || !page_is(page, key, words[1]))
                fail("shared key %llu: a page that was never put", (unsigned long long)key);
        }
        if (rc < 0)
            fail("a shared pool says %d", rc);
    }
    switch (next_random(rng) % 8) {
    case 0:
        pool_destroy(ctx, h.pool, h.serial);
        break;
    case 1:
        client_revoke(ctx, id, serial, uuid);
        break;
    case 2:
        client_destroy(ctx, id, serial);
        break;
    default:
        return;
    }
    if (tm_get(&h, oid, 0, page, 1) != TM_NOPOOL)
        fail("a shared pool answers a client that has left it");
}

/* Turned off, nothing is stored or found; turned on again, nothing that was there before. Floors and holding beside. */
static void do_modes(struct tm_segment *seg, uint32_t slot, uint64_t *rng)
{
    struct tm_ctx *ctx = ctx_get(seg);
    uint32_t id, serial;
    struct tm_handle e, p;
    uint8_t oid[TM_OID], page[TM_PAGE];
    oid_make(oid, 5);
    if (!own_client(ctx, "moody", slot, &id, &serial))
        return;
    client_hold(ctx, id, serial);
    client_set_mode(ctx, id, serial, MODE_ON);
    drop_pools(seg, id);
    if (!own_pool(seg, id, serial, (struct pool_wish){.persistent = false}, &e)
        || !own_pool(seg, id, serial, (struct pool_wish){.persistent = true}, &p))
        return;
    int rc = client_set_floor(ctx, id, serial, next_random(rng) % 4 ? 0 : next_random(rng) % (1 << 19));
    if (rc != TM_OK && rc != TM_TOO_MUCH)
        fail("floor says %d", rc);
    for (uint32_t i = 0; i < 10; i++) {
        page_make(page, 88, i);
        tm_put(&e, oid, i, page, 1, KEEP_NOTHING);
        tm_put(&p, oid, i, page, 1, KEEP_NOTHING);
    }
    bool off = next_random(rng) & 1;
    rc = client_set_mode(ctx, id, serial, off ? MODE_OFF : MODE_FROZEN);
    page_make(page, 88, 1000);
    if (tm_put(&e, oid, 3, page, 1, KEEP_NOTHING) != 0 || tm_put(&p, oid, 3, page, 1, KEEP_NOTHING) != 0)
        fail("a client that is frozen or off has stored a page");
    client_set_mode(ctx, id, serial, MODE_ON);
    for (uint32_t i = 0; rc == TM_OK && i < 10; i++)
        if ((off || i == 3) && tm_get(&e, oid, i, page, 1) != 0)
            fail("page %u was found after the client had been %s", i, off ? "off" : "frozen");
    rc = (int)tm_get(&p, oid, 3, page, 1);
    if (rc != 0)
        fail("after a refused put get says %d", rc);
    if (next_random(rng) % 4 == 0)
        client_destroy(ctx, id, serial);
}

/* Copy everything that is new to the staged client's pool. */
static void pass_on(const struct tm_handle *from, const struct tm_handle *to, bool *refused)
{
    uint8_t records[16384];
    struct tm_export e = {.pool = *from, .changes = true};
    int64_t n;
    while ((n = tm_export_fill(&e, records, sizeof records)) > 0) {
        int64_t rc = tm_import(to, records, (size_t)n);
        if (rc < 0 && rc != TM_REFUSED)
            fail("import says %lld", (long long)rc);
        *refused |= rc == TM_REFUSED;
    }
    if (n < 0)
        fail("export says %lld", (long long)n);
}

/* A client goes on changing while it is copied to a staged one; then both must be equal. */
static void do_handoff(struct tm_segment *seg, uint32_t slot, uint64_t *rng)
{
    enum { PAGES = 30 };
    struct tm_ctx *ctx = ctx_get(seg);
    uint32_t id, serial, sid, sserial;
    struct tm_handle from, to;
    uint64_t versions[PAGES] = {0};
    uint8_t oid[TM_OID], page[TM_PAGE];
    char name[32];
    bool refused = false;
    oid_make(oid, 6);
    if (!own_client(ctx, "mover", slot, &id, &serial))
        return;
    int rc = client_handoff(ctx, id, serial, PHASE_COPYING);
    if (rc != TM_OK) { /* our predecessor's handoff: until a reaper has found out, or departed for good */
        client_handoff(ctx, id, serial, PHASE_NONE);
        tm_reap(ctx);
        return;
    }
    drop_pools(seg, id);
    snprintf(name, sizeof name, "moved%u", slot);
    if (client_open(ctx, name, false, &sid, &sserial) == TM_OK)
        client_destroy(ctx, sid, sserial);
    rc = client_stage(ctx, name, &sid, &sserial);
    if (rc != TM_OK && rc != TM_FULL && rc != TM_TAKEN)
        fail("staging says %d", rc);
    if (rc != TM_OK || !own_pool(seg, id, serial, (struct pool_wish){.persistent = true}, &from)
        || !own_pool(seg, sid, sserial, (struct pool_wish){.persistent = true}, &to)) {
        client_handoff(ctx, id, serial, PHASE_NONE);
        return;
    }
    for (unsigned round = 0; round < 4; round++) {
        for (unsigned n = 0; n < 20; n++) {
            uint32_t i = (uint32_t)(next_random(rng) % PAGES);
            if (next_random(rng) % 3 == 0) {
                tm_flush(&from, oid, i * 37, 1);
                versions[i] = 0;
            } else {
                uint64_t version = atomic_fetch_add(&shared->contended_version, 1) + 1;
                page_make(page, 99, version);
                versions[i] = tm_put(&from, oid, i * 37, page, 1, KEEP_NOTHING) == 1 ? version : 0;
            }
        }
        pass_on(&from, &to, &refused);
    }
    if (client_handoff(ctx, id, serial, PHASE_FROZEN) == TM_OK) {
        pass_on(&from, &to, &refused);
        for (uint32_t i = 0; i < PAGES && !refused; i++) {
            rc = (int)tm_get(&to, oid, i * 37, page, 1);
            if (rc != (versions[i] != 0) || (rc == 1 && !page_is(page, 99, versions[i])))
                fail("page %u of a copy: found %d, version %llu", i, rc, (unsigned long long)versions[i]);
        }
        if (next_random(rng) & 1)
            client_commit(ctx);
        if (next_random(rng) & 1 && client_handoff(ctx, id, serial, PHASE_DEPARTED) == TM_OK)
            client_destroy(ctx, id, serial);
    }
    client_destroy(ctx, sid, sserial);
    client_handoff(ctx, id, serial, PHASE_NONE);
}

#endif
