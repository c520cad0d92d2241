/* Deterministic interleavings of processes that are stopped at named points: the windows that random kills miss.
 *
 *   interleave PATH [scenario]
 *
 * An actor is a child process that runs one operation and stops where it is told; the driver lets it go on, or
 * kills it there. Every scenario ends with a check of all invariants. */
#include "witness.h"

#include <signal.h>
#include <stdarg.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ACTORS = 4 };
struct actor {
    _Atomic uint32_t point, skip; /* stop at this point, after passing it `skip` times */
    _Atomic uint32_t reached, go;
    _Atomic int64_t result;
    _Atomic uint32_t finished;
    uint8_t page[TM_PAGE];
};
static struct actor *actors;
static struct actor *self;
static const char *path;
static const char *scenario;
static int failures;

struct world {
    struct tm_segment *seg;
    struct tm_handle pool, taken, ephemeral; /* persistent, persistent with exclusive gets, ephemeral */
};
typedef int64_t (*operation)(struct world *w, struct actor *a);

static void nap(void)
{
    struct timespec ts = {.tv_nsec = 200000};
    nanosleep(&ts, NULL);
}

void kill_point(int n)
{
    if (!self || atomic_load(&self->point) != (uint32_t)n || atomic_load(&self->reached))
        return;
    if (atomic_load(&self->skip)) {
        atomic_fetch_sub(&self->skip, 1);
        return;
    }
    atomic_store(&self->reached, 1);
    while (!atomic_load(&self->go))
        nap();
}

static void expect(bool good, const char *format, ...)
{
    va_list args;
    if (good)
        return;
    va_start(args, format);
    fprintf(stderr, "FAIL %s: ", scenario);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    failures++;
}

static void open_world(struct world *w)
{
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    client_open(ctx, "test", true, &id, &serial);
    struct tm_handle *handles[] = {&w->pool, &w->taken, &w->ephemeral};
    for (int i = 0; i < 3; i++) {
        handles[i]->seg = w->seg;
        uint32_t p = id * TM_CLIENT_POOLS + (uint32_t)i;
        if (atomic_load(&w->seg->pools[p].state) == 1) {
            handles[i]->pool = p;
            handles[i]->serial = atomic_load(&w->seg->pools[p].serial);
        } else {
            pool_new(ctx, id, serial, i < 2, i == 1, &handles[i]->pool, &handles[i]->serial);
        }
    }
}

/* Start actor `i`; it runs `op` and stops at `point` (0: nowhere). */
static pid_t start(int i, operation op, uint32_t point, uint32_t skip)
{
    struct actor *a = &actors[i];
    memset(a, 0, sizeof *a);
    a->point = point;
    a->skip = skip;
    pid_t pid = fork();
    if (pid)
        return pid;
    struct world w = {0};
    if (tm_attach(path, &w.seg))
        _exit(3);
    open_world(&w);
    self = a;
    atomic_store(&a->result, op(&w, a));
    self = NULL;
    atomic_store(&a->finished, 1);
    tm_close(w.seg);
    _exit(0);
}

static bool wait_for(_Atomic uint32_t *flag)
{
    for (int i = 0; i < 25000; i++) {
        if (atomic_load(flag))
            return true;
        nap();
    }
    return false;
}

static void at_point(int i) { expect(wait_for(&actors[i].reached), "actor %d never came to point %u", i, actors[i].point); }

static void die(pid_t pid)
{
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static void finish(int i, pid_t pid)
{
    int status = 0;
    atomic_store(&actors[i].go, 1);
    bool ended = wait_for(&actors[i].finished);
    expect(ended, "actor %d does not get on", i);
    if (!ended)
        kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    expect(status == 0, "actor %d ended with status %x", i, status);
}

static void say(void *arg, const char *line)
{
    (void)arg;
    expect(false, "check: %s", line);
}

static void check(struct world *w)
{
    tm_reap(ctx_get(w->seg));
    tm_check(ctx_get(w->seg), say, NULL);
}

static uint8_t oid[TM_OID];

static bool is(const uint8_t *page, uint32_t index, uint64_t version)
{
    return page_is(page, 5000 + index, version * 2654435761u); /* versions of which none is same-filled */
}

static int64_t put(const struct tm_handle *h, uint32_t index, uint64_t version)
{
    uint8_t page[TM_PAGE];
    page_make(page, 5000 + index, version * 2654435761u);
    return tm_put(h, oid, index, page, 1, true);
}

static bool holds(const struct tm_handle *h, uint32_t index, uint64_t version)
{
    uint8_t page[TM_PAGE];
    return tm_get(h, oid, index, page, 1) == 1 && is(page, index, version);
}

static int64_t get_one(struct world *w, struct actor *a) { return tm_get(&w->pool, oid, 1, a->page, 1); }
static int64_t take_one(struct world *w, struct actor *a) { return tm_get(&w->taken, oid, 1, a->page, 1); }
static int64_t put_two(struct world *w, struct actor *a) { (void)a; return put(&w->pool, 1, 2); }
static int64_t put_three(struct world *w, struct actor *a) { (void)a; return put(&w->pool, 1, 3); }
static int64_t flush_one(struct world *w, struct actor *a) { (void)a; return tm_flush(&w->pool, oid, 1, 1); }

/* Register as a thread, wait at point 99, then put page 1's first version as page 2: a block of the same size. */
static int64_t put_twin(struct world *w, struct actor *a)
{
    uint8_t page[TM_PAGE];
    tm_get(&w->pool, oid, 9, page, 1);
    kill_point(99);
    atomic_store(&a->point, 44);
    atomic_store(&a->reached, 0);
    atomic_store(&a->go, 0);
    page_make(page, 5001, 2654435761u);
    return tm_put(&w->pool, oid, 2, page, 1, true);
}
static int64_t destroy_pool(struct world *w, struct actor *a)
{
    (void)a;
    return pool_destroy(ctx_get(w->seg), w->pool.pool, w->pool.serial);
}
static int64_t reap_empty(struct world *w, struct actor *a)
{
    (void)a;
    return object_reap_empty(ctx_get(w->seg), 100);
}

/* A reader is stopped after it verified a block and before it decodes it; the block is replaced and used again for
 * another page. The reader must return a whole page, old or new. */
static void reader_and_reuse(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t reader = start(0, get_one, 46, 0);
    at_point(0);
    put(&w->pool, 1, 4);
    for (uint32_t i = 10; i < 200; i++) /* somewhere in here the old block is used again */
        put(&w->pool, i, 1);
    finish(0, reader);
    expect(actors[0].result == 1, "the reader got %lld", (long long)actors[0].result);
    expect(is(actors[0].page, 1, 1) || is(actors[0].page, 1, 4),
           "the reader got a page that never was");
    check(w);
}

/* C means to replace block B and dies before its swap. A has swapped B out and not freed it yet. Who repairs C must
 * leave B to A. */
static void repair_beside_living(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t c = start(1, put_three, 40, 0);
    at_point(1);
    pid_t a = start(0, put_two, 41, 0);
    at_point(0);
    die(c);
    tm_reap(ctx_get(w->seg));
    for (uint32_t i = 10; i < 60; i++) /* B must not be handed out */
        put(&w->pool, i, 1);
    finish(0, a);
    expect(holds(&w->pool, 1, 2), "the acknowledged page is lost");
    for (uint32_t i = 10; i < 60; i++)
        expect(holds(&w->pool, i, 1), "page %u is lost", i);
    check(w);
}

/* A dies inside the bin's lock after it unmarked B; B is allocated again before A is repaired. */
static void freed_and_reused(struct world *w)
{
    uint8_t page[TM_PAGE];
    put(&w->pool, 1, 1);
    put(&w->pool, 2, 2); /* its leaf exists */
    pid_t c = start(1, put_twin, 99, 0); /* registered now, so that it does not inherit A's record and repair it */
    at_point(1);
    pid_t a = start(0, flush_one, 6, 0);
    at_point(0);
    die(a);
    atomic_store(&actors[1].go, 1);
    while (atomic_load(&actors[1].go))
        nap();
    at_point(1); /* it took the lock over from the dead, and has B */
    uint64_t dead = 0, living = 0;
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++) {
        dead = w->seg->threads[i].old_block ? w->seg->threads[i].old_block : dead;
        living = w->seg->threads[i].new_block ? w->seg->threads[i].new_block : living;
    }
    expect(dead && dead == living, "the scenario did not come about (%llu, %llu)", (unsigned long long)dead,
           (unsigned long long)living);
    tm_reap(ctx_get(w->seg));
    for (uint32_t i = 10; i < 60; i++)
        put(&w->pool, i, 2);
    finish(1, c);
    expect(tm_get(&w->pool, oid, 2, page, 1) == 1 && is(page, 1, 1), "the page of the living is lost");
    check(w);
}

/* An exclusive get is stopped before its swap; the page is replaced. It must return the new one, and remove it. */
static void take_and_replace(struct world *w)
{
    put(&w->taken, 1, 1);
    pid_t a = start(0, take_one, 40, 0);
    at_point(0);
    put(&w->taken, 1, 2);
    finish(0, a);
    expect(actors[0].result == 1 && is(actors[0].page, 1, 2), "not the page that was there");
    expect(!holds(&w->taken, 1, 1) && !holds(&w->taken, 1, 2), "the page is still there");
    check(w);
}

/* A put has written its block when the pool begins to be destroyed; the destroyer waits for it. */
static void put_and_destroy(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, put_two, 45, 0);
    at_point(0);
    pid_t b = start(1, destroy_pool, 60, 0);
    at_point(1);
    atomic_store(&actors[1].go, 1);
    for (int i = 0; i < 50; i++)
        nap();
    expect(!atomic_load(&actors[1].finished), "the destroyer did not wait");
    finish(0, a);
    finish(1, b);
    expect(!holds(&w->pool, 1, 2), "the pool still answers");
    check(w);
}

/* A put to an object that was just flushed is stopped before its swap; the object is killed meanwhile. The put must
 * find out and store its page in a new one. */
static void put_and_reap(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, put_two, 45, 0);
    at_point(0);
    tm_flush_object(&w->pool, oid);
    pid_t b = start(1, reap_empty, 28, 0);
    at_point(1); /* the object is unlinked, its slots are dead; the reaper waits for the put before it frees them */
    atomic_store(&actors[1].go, 1);
    finish(0, a);
    finish(1, b);
    expect(actors[0].result == 1 && holds(&w->pool, 1, 2), "the acknowledged page is lost");
    check(w);
}

/* A put is stopped before its swap into an empty slot; the reaper kills the slots before it, and dies. */
static void put_and_dead_reaper(struct world *w)
{
    put(&w->pool, 1, 1);
    tm_flush_object(&w->pool, oid);
    pid_t b = start(1, reap_empty, 27, 0);
    at_point(1);
    die(b);
    pid_t a = start(0, put_two, 0, 0); /* meets dead slots and must finish the dead one's work itself */
    finish(0, a);
    expect(actors[0].result == 1 && holds(&w->pool, 1, 2), "the acknowledged page is lost");
    check(w);
}

/* The reaper meets a page in an object that it believed empty: the object lives on. */
static void reap_and_put(struct world *w)
{
    put(&w->pool, 1, 1);
    put(&w->pool, 600, 1);
    tm_flush_object(&w->pool, oid);
    pid_t b = start(1, reap_empty, 26, 0); /* condemned, no slot killed yet; the shard lock is held */
    at_point(1);
    pid_t a = start(0, put_two, 0, 0); /* needs no shard lock: the leaf is there */
    finish(0, a);
    finish(1, b);
    expect(holds(&w->pool, 1, 2), "the acknowledged page is lost");
    check(w);
}

/* A reader stopped inside a block: its chunk must not be punched, however free it is. */
static void reader_and_punch(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, get_one, 46, 0);
    at_point(0);
    tm_flush(&w->pool, oid, 0, 4096);
    expect(tm_trim(ctx_get(w->seg), 0) == 0, "memory was punched under a reader");
    finish(0, a);
    expect(actors[0].result == 0, "the reader got %lld of a flushed page", (long long)actors[0].result);
    expect(tm_trim(ctx_get(w->seg), 0) > 0, "nothing could be punched after the reader left");
    check(w);
}

static const struct {
    const char *name;
    void (*run)(struct world *w);
} scenarios[] = {
    {"reader_and_reuse", reader_and_reuse},       {"repair_beside_living", repair_beside_living},
    {"freed_and_reused", freed_and_reused},       {"take_and_replace", take_and_replace},
    {"put_and_destroy", put_and_destroy},         {"put_and_reap", put_and_reap},
    {"put_and_dead_reaper", put_and_dead_reaper}, {"reap_and_put", reap_and_put},
    {"reader_and_punch", reader_and_punch},
};

int main(int argc, char **argv)
{
    unsigned ran = 0;
    if (argc < 2) {
        fprintf(stderr, "usage: interleave PATH [scenario]\n");
        return 2;
    }
    path = argv[1];
    actors = shared_memory(sizeof *actors * ACTORS);
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        struct world w = {0};
        if (argc > 2 && strcmp(argv[2], scenarios[i].name))
            continue;
        scenario = scenarios[i].name;
        unlink(path);
        if (tm_create(path, 16u << 20, &w.seg))
            return 2;
        open_world(&w);
        int before = failures;
        scenarios[i].run(&w);
        printf("%-22s %s\n", scenario, failures == before ? "ok" : "FAILED");
        fflush(stdout);
        tm_close(w.seg);
        unlink(path);
        ran++;
    }
    return failures || !ran;
}
