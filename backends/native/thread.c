/* Thread records: who lives, who is inside an operation, and grace periods.
 *
 * A thread registers itself at its first call by taking the `life` mutex of a record and keeps it until it ends;
 * the kernel then marks the mutex, whether the thread returned, or its process was killed. So liveness needs no
 * process ids. After a fork the child's threads register anew: the record belongs to the parent. */
#include "tm.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static _Thread_local struct tm_ctx *contexts; /* of the calling thread, one per segment */
static _Atomic uint32_t forks;                /* how often this process is a forked child */
static pthread_key_t at_exit;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void forked(void) { atomic_fetch_add(&forks, 1); }

static void forget(struct tm_ctx *ctx)
{
    if (ctx->fork == atomic_load(&forks)) {
        client_release(ctx, ctx->index);
        if (ctx->window.open) /* else the next owner of the record began with an odd mark */
            tier_close(ctx);
        if (!atomic_load(&ctx->rec->doomed)) /* else a reaper finishes what waits for a grace period */
            atomic_store(&ctx->rec->used, 0);
        lock_drop(&ctx->rec->life);
        atomic_fetch_sub(&ctx->seg->users, 1);
    }
    codec_expander_free(ctx->expander);
    free(ctx);
}

static void thread_ended(void *list)
{
    for (struct tm_ctx *ctx = list, *next; ctx; ctx = next) {
        next = ctx->next;
        forget(ctx);
    }
}

static void setup(void)
{
    pthread_atfork(NULL, NULL, forked);
    if (pthread_key_create(&at_exit, thread_ended))
        abort();
}

/* Repair what the owner of record `i` left; we hold its life lock. */
static bool bury(struct tm_ctx *ctx, uint32_t i, int life)
{
    struct tm_thread *rec = &ctx->seg->threads[i];
    if (life == LIFE_DEAD)
        note_death(ctx->seg);
    client_release(ctx, i);
    if (!repair_thread(ctx, i))
        return false;
    atomic_store(&rec->used, 0);
    return true;
}

/* Take a free record, or one of a dead thread after its repair. */
static struct tm_thread *claim(struct tm_ctx *ctx, uint32_t *index)
{
    struct tm_segment *seg = ctx->seg;
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++) {
        struct tm_thread *rec = &seg->threads[i];
        int life = lock_try_life(&rec->life);
        if (life == LIFE_TAKEN)
            continue;
        uint32_t seen = atomic_load(&seg->super->nthreads);
        while (seen < i + 1 && !atomic_compare_exchange_weak(&seg->super->nthreads, &seen, i + 1))
            ;
        if (atomic_load(&rec->used) && !bury(ctx, i, life)) {
            lock_drop(&rec->life); /* `used` stays: a later reaper goes on */
            continue;
        }
        fetching_end(rec);
        *index = i;
        return rec;
    }
    return NULL;
}

static struct tm_ctx *find(const struct tm_segment *seg)
{
    uint32_t generation = atomic_load_explicit(&forks, memory_order_relaxed);
    for (struct tm_ctx *ctx = contexts; ctx; ctx = ctx->next)
        if (ctx->segment == seg->id && ctx->fork == generation)
            return ctx;
    return NULL;
}

struct tm_ctx *ctx_get(struct tm_segment *seg)
{
    struct tm_ctx *ctx = contexts;
    if (ctx && ctx->segment == seg->id && ctx->fork == atomic_load_explicit(&forks, memory_order_relaxed))
        return ctx;
    if ((ctx = find(seg)))
        return ctx;
    pthread_once(&once, setup);
    if (posix_memalign((void **)&ctx, _Alignof(struct tm_ctx), sizeof *ctx))
        return NULL;
    ctx->seg = seg;
    ctx->segment = seg->id;
    ctx->fork = atomic_load(&forks);
    ctx->ticks = 0;
    ctx->client = ctx->payer = TM_MAX_CLIENTS;
    ctx->began_ns = 0;
    ctx->next_payload = NULL;
    ctx->window.open = false;
    ctx->window.nwanted = ctx->window.nheld = 0;
    ctx->unpacked.pack = 0;
    ctx->rec = NULL;
    if (!(ctx->expander = codec_expander())) {
        free(ctx);
        return NULL;
    }
    ctx->index = TM_MAX_THREADS; /* while repairing: nobody's */
    struct tm_thread *rec = claim(ctx, &ctx->index);
    if (!rec) {
        codec_expander_free(ctx->expander);
        free(ctx);
        return NULL;
    }
    ctx->rec = rec;
    rec->pid = (uint32_t)getpid();
    atomic_store(&rec->used, 1);
    atomic_fetch_add(&seg->users, 1);
    ctx->next = contexts;
    contexts = ctx;
    pthread_setspecific(at_exit, ctx);
    return ctx;
}

void ctx_release(struct tm_segment *seg)
{
    for (struct tm_ctx **p = &contexts; *p; p = &(*p)->next) {
        struct tm_ctx *ctx = *p;
        if (ctx->segment == seg->id) {
            *p = ctx->next;
            pthread_setspecific(at_exit, contexts);
            forget(ctx);
            return;
        }
    }
}

void op_begin(struct tm_ctx *ctx)
{
    /* seq_cst: whatever this operation reads was not unlinked before a grace period that began later. */
    atomic_fetch_add(&ctx->rec->op, 1);
}

void op_end(struct tm_ctx *ctx)
{
    atomic_store_explicit(&ctx->rec->op, atomic_load_explicit(&ctx->rec->op, memory_order_relaxed) + 1,
                          memory_order_release);
    if (ctx->window.open && !ctx->window.nwanted)
        tier_close(ctx);
    if (ctx->ticks-- == 0) {
        ctx->ticks = 255;
        most_update(ctx->seg);
        chunk_maintain(ctx);
    }
}

static uint64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000u + (uint64_t)ts.tv_nsec / 1000000u;
}

/* Repair the thread of record `i` if it is dead. False if it lives inside an operation, or must be tried again. */
static bool reap_one(struct tm_ctx *ctx, uint32_t i, unsigned *found)
{
    struct tm_thread *rec = &ctx->seg->threads[i];
    int life = lock_try_life(&rec->life);
    bool done = true;
    if (life == LIFE_TAKEN)
        return false;
    if (atomic_load(&rec->used)) {
        ++*found;
        done = bury(ctx, i, life);
    }
    lock_drop(&rec->life);
    return done;
}

/* Wait until each other thread's word at `offset` of its record, if it is odd and not another client's, has changed. */
static bool quiesce(struct tm_ctx *ctx, size_t offset, uint32_t client, unsigned timeout_ms)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t deadline = now_ms() + timeout_ms;
    unsigned found = 0;
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t n = atomic_load(&seg->super->nthreads);
    for (uint32_t i = 0; i < n; i++) {
        struct tm_thread *rec = &seg->threads[i];
        _Atomic uint64_t *word = (_Atomic uint64_t *)((char *)rec + offset);
        uint64_t seen = atomic_load(word), whose = seen >> FETCHING_WHOSE;
        if (rec == ctx->rec || !(seen & 1) || (whose && whose != client + 1))
            continue;
        for (unsigned spins = 0; atomic_load(word) == seen; spins++) {
            if (spins > 100 && reap_one(ctx, i, &found))
                break; /* it was dead: what it did ended with the repair */
            if (now_ms() > deadline)
                return false;
            if (spins > 200) {
                struct timespec ts = {.tv_nsec = 100000};
                nanosleep(&ts, NULL);
            } else {
                sched_yield();
            }
        }
    }
    return true;
}

bool grace(struct tm_ctx *ctx, unsigned timeout_ms)
{
    return quiesce(ctx, offsetof(struct tm_thread, op), TM_MAX_CLIENTS, timeout_ms);
}

/* A thread that is stopped while it reads delays: then nothing of that client's may be used again yet. */
bool tier_grace(struct tm_ctx *ctx, uint32_t client, unsigned timeout_ms)
{
    return MUTANT(12) || quiesce(ctx, offsetof(struct tm_thread, fetching), client, timeout_ms);
}

unsigned tm_reap(struct tm_ctx *ctx)
{
    unsigned found = 0;
    uint32_t n = atomic_load(&ctx->seg->super->nthreads);
    for (uint32_t i = 0; i < n; i++)
        if (&ctx->seg->threads[i] != ctx->rec && atomic_load(&ctx->seg->threads[i].used))
            reap_one(ctx, i, &found);
    pool_finish_dying(ctx);
    most_update(ctx->seg);
    if (atomic_exchange(&ctx->seg->super->emptied, 0) + atomic_exchange(&ctx->seg->super->look, 0))
        object_reap_empty(ctx, 4096);
    recount(ctx);
    return found;
}
