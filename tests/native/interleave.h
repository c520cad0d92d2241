/* The stage for interleavings: actors are child processes that run one operation and stop at a named point; the driver
 * lets them go on, or kills them there. */
#ifndef INTERLEAVE_H
#define INTERLEAVE_H

#include "expect.h"
#include "witness.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ACTORS = 4 };
struct actor {
    _Atomic uint32_t point, skip; /* stop at this point, after passing it `skip` times */
    _Atomic uint32_t reached, go;
    _Atomic uint32_t next;        /* 0, or where to stop once it goes on from `point` */
    _Atomic int64_t result;
    _Atomic uint32_t finished;
    pid_t pid;                    /* for the driver */
    uint8_t page[TM_PAGE];
};
static struct actor *actors;
static struct actor *self;
static const char *path;

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
    uint32_t next = atomic_exchange(&self->next, 0);
    if (next) {
        atomic_store(&self->point, next);
        atomic_store(&self->reached, 0);
        atomic_store(&self->go, 0);
    }
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
            pool_new(ctx, id, serial, &(struct pool_wish){.persistent = i < 2, .exclusive = i == 1, .id = -1},
                     &handles[i]->pool, &handles[i]->serial);
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
        return a->pid = pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a mutant may crash whoever would let it go on */
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

/* Whether a process sleeps, rather than waits for a CPU as it may for long on a busy machine. */
static inline bool sleeps(pid_t pid)
{
    char name[32], text[512];
    snprintf(name, sizeof name, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(name, "re");
    size_t n = file ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file)
        fclose(file);
    text[n] = 0;
    const char *end = strrchr(text, ')'); /* the name before it may contain anything */
    return end && end[1] == ' ' && end[2] == 'S';
}

/* Does actor `i`, who may have to wait for another one, get to setting `flag`? Not if it only sleeps. */
static inline bool gets_to(int i, _Atomic uint32_t *flag)
{
    for (int n = 0, slept = 0; n < 25000 && slept < 250 && !atomic_load(flag); n++) {
        nap();
        slept += sleeps(actors[i].pid);
    }
    return atomic_load(flag);
}

static inline void die(pid_t pid)
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

static inline bool is(const uint8_t *page, uint32_t index, uint64_t version)
{
    return page_is(page, 5000 + index, version * 2654435761u); /* versions of which none is same-filled */
}

static inline int64_t put(const struct tm_handle *h, uint32_t index, uint64_t version)
{
    uint8_t page[TM_PAGE];
    page_make(page, 5000 + index, version * 2654435761u);
    return tm_put(h, oid, index, page, 1, KEEP_OLD);
}

static inline bool holds(const struct tm_handle *h, uint32_t index, uint64_t version)
{
    uint8_t page[TM_PAGE];
    return tm_get(h, oid, index, page, 1) == 1 && is(page, index, version);
}

#endif
