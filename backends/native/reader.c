/* Who reads requests, and when: the event loop's thread, its helpers, and who stands in for it. See reader.h. */
#include "reader.h"

#include "reader_ahead.h"
#include "reader_listing.h"
#include "reader_rings.h"
#include "reader_shortcut.h"
#include "reader_waiting.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum {
    HELPERS_MOST = 8,
    HELPER_PATIENCE_MS = 2, /* for which a helper waits for more before it sleeps */
    POLL_EVERY = 32,        /* requests, of those that need no waiting: replies and the event loop want to be seen */
    LOOK_EVERY = 8,         /* requests: whether more than one waits */
    LARGE_BYTES = 256 << 10, /* whose decompression takes longer than to wake a helper */
    BURST = 64,             /* requests of a call that may not wait */
    FULL_MS = 10,           /* between two looks for room where no event tells */
    POLL_MS = 50,           /* of the stand-in: so long it may take to notice that it is not needed any more */
};

/* One thread's buffers; whoever sleeps gives them back. */
struct desk {
    struct buffer *request, *data; /* NULL: none */
};

struct helper {
    struct reader *reader;
    struct desk desk;
    pthread_t thread;
};

struct reader {
    int device, ours, theirs;
    int others; /* epoll of everything but the device: to poll two descriptors costs half of what four do */
    int wake;   /* what else is in there, -1 nothing */
    struct hits hits;
    struct buffers *buffers;
    struct passing passing;
    struct waiting waiting;
    struct shortcut shortcut;
    _Atomic(struct nodes *) nodes, answering; /* the second: NULL, or the same */
    struct ends ends;
    struct desk desk; /* of who calls reader_serve */
    struct ahead ahead;
    struct rings *rings; /* NULL: all requests come by the device */
    struct desk *ring_desks;
    _Atomic uint32_t turns; /* raised when it is entered and when it is left: odd within */

    pthread_mutex_t sleep_lock;
    pthread_cond_t awake;
    unsigned nhelpers, calls;
    bool ending;
    _Atomic uint32_t idle, active;
    _Atomic bool paused;
    struct helper helpers[HELPERS_MOST];
    struct helper standin;
    bool has_standin;
    unsigned away_ms; /* after which it takes the place of the event loop's thread */
    _Atomic bool rests; /* the stand-in sleeps until the event loop's thread goes away, or is needed otherwise */
    pthread_cond_t needed;
    uint32_t looks, asked; /* asked: whether there is one CPU only */
    bool several, one_cpu; /* more than one request waited when it was looked last */

    _Atomic uint64_t woken, attributes, ended;
};

/* ---- Buffers ---------------------------------------------------------------------------------------------- */

static bool desk_fill(struct reader *r, struct desk *d)
{
    if (!d->request)
        d->request = buffer_take(r->buffers, 0);
    if (!d->data)
        d->data = buffer_take(r->buffers, 0);
    return d->request && d->data;
}

static void desk_clear(struct desk *d)
{
    if (d->request)
        buffer_drop(d->request);
    if (d->data)
        buffer_drop(d->data);
    *d = (struct desk){NULL, NULL};
}

/* ---- Helpers ---------------------------------------------------------------------------------------------- */

static bool more_waits(const struct reader *r)
{
    struct pollfd p = {.fd = r->device, .events = POLLIN};
    return poll(&p, 1, 0) > 0;
}

static bool has_one_cpu(struct reader *r)
{
    if (r->asked++ % POLL_EVERY == 0) { /* a process may be moved at any time */
        cpu_set_t cpus;
        r->one_cpu = !sched_getaffinity(0, sizeof cpus, &cpus) && CPU_COUNT(&cpus) == 1;
    }
    return r->one_cpu;
}

static void wake_helper(struct reader *r)
{
    if (!atomic_load_explicit(&r->idle, memory_order_relaxed) || has_one_cpu(r))
        return;
    pthread_mutex_lock(&r->sleep_lock);
    if (atomic_load(&r->idle) > r->calls) {
        r->calls++;
        atomic_fetch_add_explicit(&r->woken, 1, memory_order_relaxed);
        pthread_cond_signal(&r->awake);
    }
    pthread_mutex_unlock(&r->sleep_lock);
}

/* ---- Reading ---------------------------------------------------------------------------------------------- */

static void wake_standin(struct reader *r)
{
    if (!atomic_load(&r->rests)) /* where there is work all the time, 20 times a second */
        return;
    pthread_mutex_lock(&r->sleep_lock);
    pthread_cond_signal(&r->needed);
    pthread_mutex_unlock(&r->sleep_lock);
}

enum taken { TAKEN_NONE, TAKEN_ANSWERED, TAKEN_PASSED_ON, TAKEN_ASKED, TAKEN_GONE };

static void look_after_interrupts(struct reader *r)
{
    if (passing_interrupted(&r->passing))
        wake_standin(r);
}

/* What needs neither the pool nor libfuse: attributes, and that a listing has ended. `length`: of the request; `size`: of
 * what is in `out`. */
static bool find_at_hand(struct reader *r, const struct fuse_in_header *in, const void *argument, size_t length,
                         struct fuse_attr_out *out, size_t *size)
{
    if (in->opcode == FUSE_GETATTR) {
        struct nodes *nodes = atomic_load_explicit(&r->answering, memory_order_acquire);
        if (!nodes || !nodes_attributes(nodes, in->nodeid, out))
            return false;
        atomic_fetch_add_explicit(&r->attributes, 1, memory_order_relaxed);
        *size = sizeof *out;
        return true;
    }
    const struct fuse_read_in *listing = argument;
    if (in->opcode != FUSE_READDIRPLUS || length < sizeof *in + sizeof *listing
        || !ends_at(&r->ends, listing->fh, listing->offset))
        return false;
    atomic_fetch_add_explicit(&r->ended, 1, memory_order_relaxed);
    *size = 0;
    return true;
}

/* Wait for the lower, and be away from requests meanwhile, so that the stand-in comes if it takes long. */
static bool wait_here(struct reader *r, struct desk *d, size_t length)
{
    atomic_fetch_add(&r->turns, 1);
    wake_standin(r);
    bool done = waiting_do(&r->waiting, &d->request, &d->data, length);
    atomic_fetch_add(&r->turns, 1);
    return done;
}

/* `leads`: for the event loop's thread, which wakes helpers. */
static enum taken take(struct reader *r, struct desk *d, bool leads)
{
    if (!desk_fill(r, d)) /* no memory: later */
        return TAKEN_NONE;
    ssize_t n = read(r->device, d->request->data, d->request->size);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR || errno == ENOENT ? TAKEN_NONE : TAKEN_GONE;
    if (!n)
        return TAKEN_GONE;
    size_t length = (size_t)n;
    const struct fuse_in_header *in = (const void *)d->request->data;
    if (length < sizeof *in)
        return TAKEN_NONE;
    if (leads && r->looks++ % LOOK_EVERY == 0) { /* before the answer: after it one client is enough */
        r->several = more_waits(r); /* a read that finds nothing costs what it would have saved */
        if (r->several)
            wake_helper(r);
    }
    if (length >= sizeof *in + sizeof(struct fuse_read_in) && in->opcode == FUSE_READ) {
        const struct fuse_read_in *read_in = (const void *)(in + 1);
        if (leads && read_in->size >= LARGE_BYTES && more_waits(r))
            wake_helper(r);
        struct answer answer;
        enum found found = leads && ahead_has(&r->ahead, &r->hits, read_in, &answer)
                               ? FOUND
                               : hits_find(&r->hits, read_in, d->data->data, false, &answer);
        if (found == FOUND) {
            reply_bytes(&r->passing, NULL, in->unique, answer.bytes, answer.length);
            if (leads && ahead_expects(&r->ahead, read_in) && !has_one_cpu(r) && !more_waits(r))
                ahead_fetch(&r->ahead, &r->hits, r->buffers, read_in);
            return TAKEN_ANSWERED;
        }
        if (found == FOUND_IF_WAITING && leads && !r->several && waiting_is_quick(&r->waiting) && wait_here(r, d, length))
            return TAKEN_ANSWERED;
        if (found == FOUND_IF_WAITING && waiting_give(&r->waiting, &d->request, &d->data, length, NULL)) {
            look_after_interrupts(r);
            return TAKEN_NONE;
        }
    }
    struct fuse_attr_out at_hand;
    size_t size;
    if (find_at_hand(r, in, in + 1, length, &at_hand, &size)) {
        reply_bytes(&r->passing, NULL, in->unique, (const uint8_t *)&at_hand, size);
        return TAKEN_ANSWERED;
    }
    if (leads && atomic_load_explicit(&r->idle, memory_order_relaxed) && more_waits(r))
        wake_helper(r); /* Python is going to be busy */
    if (shortcut_put(&r->shortcut, &r->passing, in, length, NULL, leads)) {
        look_after_interrupts(r);
        return TAKEN_ASKED;
    }
    enum passed passed = pass_on(&r->passing, &d->request, length, NULL);
    look_after_interrupts(r);
    return passed == PASSED ? TAKEN_PASSED_ON : TAKEN_NONE;
}

/* The same for what a ring has brought. */
static bool take_from_ring(void *with, unsigned ring, struct entry *e)
{
    struct reader *r = with;
    struct desk *d = &r->ring_desks[ring];
    const struct fuse_in_header *in = entry_request(e);
    enum found found = FOUND_NOT;
    if (in->len >= sizeof *in + sizeof(struct fuse_read_in) && in->opcode == FUSE_READ) {
        const struct fuse_read_in *read_in = entry_argument(e);
        struct answer answer;
        if (read_in->size <= entry_most(e))
            found = hits_find(&r->hits, read_in, entry_payload(e, read_in->size), false, &answer);
        if (found == FOUND) {
            entry_fill(e, 0, answer.bytes, answer.length);
            return true;
        }
    }
    struct fuse_attr_out at_hand;
    size_t size;
    if (find_at_hand(r, in, entry_argument(e), in->len, &at_hand, &size)) {
        entry_fill(e, 0, (const uint8_t *)&at_hand, size);
        return true;
    }
    size_t length = desk_fill(r, d) ? entry_copy(e, d->request->data, d->request->size) : 0;
    if (!length) {
        entry_fill(e, d->request && d->data ? -EIO : -ENOMEM, NULL, 0);
        return true;
    }
    in = (const void *)d->request->data;
    if (!shortcut_put(&r->shortcut, &r->passing, in, length, e, false)
        && (found != FOUND_IF_WAITING || !waiting_give(&r->waiting, &d->request, &d->data, length, e)))
        (void)pass_on(&r->passing, &d->request, length, e);
    look_after_interrupts(r);
    return false;
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int watch(int epoll, int fd)
{
    struct epoll_event event = {.events = EPOLLIN};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void set_wake(struct reader *r, int wake)
{
    if (r->wake >= 0)
        (void)epoll_ctl(r->others, EPOLL_CTL_DEL, r->wake, NULL);
    r->wake = wake >= 0 && watch(r->others, wake) == 0 ? wake : -1;
}

/* One of the others is readable: pass replies on; what there is for the caller, if anything. */
static bool look_at_others(struct reader *r, enum reader_event *event)
{
    struct pollfd p[4] = {{.fd = r->ours, .events = POLLIN},
                          {.fd = r->theirs, .events = POLLIN},
                          {.fd = r->wake, .events = POLLIN},
                          {.fd = r->shortcut.event, .events = POLLIN}};
    (void)poll(p, 4, 0);
    if (p[0].revents)
        passing_drain(&r->passing);
    bool asked = p[3].revents && (!p[1].revents || r->looks++ % 2); /* neither kind waits for all of the other */
    *event = asked ? READER_ASKED : p[1].revents ? READER_REQUEST : READER_NOTHING;
    return *event != READER_NOTHING || p[2].revents;
}

static enum reader_event serve(struct reader *r, int wake, int timeout_ms)
{
    int64_t until = timeout_ms > 0 ? now_ms() + timeout_ms : 0;
    enum reader_event event = READER_NOTHING;
    unsigned served = 0;
    bool flows = false; /* there is probably another request: do not wait for it */
    if (wake != r->wake)
        set_wake(r, wake);
    if (passing_expects(&r->passing))
        passing_drain(&r->passing);
    for (;;) {
        bool full = passing_full(&r->passing);
        if (full || !flows || served % POLL_EVERY == 0) {
            int64_t left = timeout_ms > 0 ? until - now_ms() : timeout_ms;
            if (timeout_ms > 0 && left <= 0)
                return READER_NOTHING; /* whoever set the deadline is due, however many requests wait */
            struct pollfd p[2] = {{.fd = full ? -1 : r->device, .events = POLLIN}, {.fd = r->others, .events = POLLIN}};
            bool looks_again = full && (left < 0 || left > FULL_MS);
            int n = poll(p, 2, looks_again ? FULL_MS : (int)left);
            if (!n && looks_again) {
                passing_drain(&r->passing);
                continue;
            }
            if (n <= 0)
                return READER_NOTHING;
            if (p[1].revents && look_at_others(r, &event))
                return event;
            if (!p[0].revents)
                continue;
        }
        enum taken t = take(r, &r->desk, true);
        if (t == TAKEN_GONE)
            return READER_GONE;
        if (t == TAKEN_PASSED_ON)
            return READER_REQUEST;
        if (t == TAKEN_ASKED)
            return READER_ASKED;
        served += t == TAKEN_ANSWERED;
        flows = r->several && t == TAKEN_ANSWERED;
        if (timeout_ms == 0 && served >= BURST)
            return READER_NOTHING;
    }
}

static bool is_away(uint32_t turns) { return turns % 2 == 0; }

enum reader_event reader_serve(struct reader *r, int wake, int timeout_ms)
{
    atomic_fetch_add(&r->turns, 1);
    enum reader_event event = serve(r, wake, timeout_ms);
    atomic_fetch_add(&r->turns, 1);
    wake_standin(r);
    return event;
}

static void *help(void *arg)
{
    struct helper *h = arg;
    struct reader *r = h->reader;
    pthread_mutex_lock(&r->sleep_lock);
    for (;;) {
        atomic_fetch_add(&r->idle, 1);
        while (!r->calls && !r->ending)
            pthread_cond_wait(&r->awake, &r->sleep_lock);
        atomic_fetch_sub(&r->idle, 1);
        if (r->ending)
            break;
        r->calls--;
        atomic_fetch_add(&r->active, 1);
        pthread_mutex_unlock(&r->sleep_lock);
        struct pollfd p = {.fd = r->device, .events = POLLIN};
        bool flows = false;
        while (!atomic_load(&r->paused) && !passing_full(&r->passing)
               && (flows || poll(&p, 1, HELPER_PATIENCE_MS) > 0)) {
            enum taken t = take(r, &h->desk, false);
            if (t == TAKEN_GONE)
                break;
            flows = t == TAKEN_ANSWERED;
        }
        desk_clear(&h->desk);
        pthread_mutex_lock(&r->sleep_lock);
        atomic_fetch_sub(&r->active, 1);
    }
    pthread_mutex_unlock(&r->sleep_lock);
    return NULL;
}

/* Sleep for a moment; before that until the event loop's thread leaves reader_serve, if it is there. The lock is held. */
static void rest(struct reader *r, uint32_t turns)
{
    struct timespec until;
    atomic_store(&r->rests, true);
    while (!is_away(turns) && atomic_load(&r->turns) == turns && !r->ending && !passing_interrupted(&r->passing))
        pthread_cond_wait(&r->needed, &r->sleep_lock);
    atomic_store(&r->rests, false);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += r->away_ms / 1000;
    until.tv_nsec += r->away_ms % 1000 * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    while (!r->ending && pthread_cond_timedwait(&r->needed, &r->sleep_lock, &until) == 0)
        ;
}

static void serve_instead(struct reader *r, struct desk *d, uint32_t turns)
{
    struct pollfd p = {.fd = r->device, .events = POLLIN};
    while (!atomic_load(&r->paused) && atomic_load(&r->turns) == turns && !passing_full(&r->passing)) {
        int n = poll(&p, 1, POLL_MS);
        if (n < 0 || (n > 0 && take(r, d, false) == TAKEN_GONE))
            return;
        passing_recheck(&r->passing);
    }
}

/* The stand-in: serves as long as the event loop's thread does not come back, because a handler of its own waits for
 * the lower, say. Hits go on; the rest is passed on to where that thread will find it. It also sees to requests that
 * were interrupted, wherever that thread is. */
static void *stand_in(void *arg)
{
    struct helper *h = arg;
    struct reader *r = h->reader;
    pthread_mutex_lock(&r->sleep_lock);
    while (!r->ending) {
        uint32_t turns = atomic_load(&r->turns);
        rest(r, turns);
        bool stays_away = is_away(turns) && atomic_load(&r->turns) == turns;
        atomic_fetch_add(&r->active, stays_away);
        pthread_mutex_unlock(&r->sleep_lock);
        passing_recheck(&r->passing);
        if (stays_away)
            serve_instead(r, &h->desk, turns);
        desk_clear(&h->desk);
        pthread_mutex_lock(&r->sleep_lock);
        atomic_fetch_sub(&r->active, stays_away);
    }
    pthread_mutex_unlock(&r->sleep_lock);
    return NULL;
}

/* ---- Life ------------------------------------------------------------------------------------------------- */

static void clocked_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
}

struct reader *reader_new(int device, int ours, int theirs, unsigned helpers, size_t largest, unsigned away_ms,
                          unsigned quick_us)
{
    struct reader *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->device = device;
    r->ours = ours;
    r->theirs = theirs;
    r->wake = -1;
    pthread_mutex_init(&r->sleep_lock, NULL);
    pthread_cond_init(&r->awake, NULL);
    clocked_cond_init(&r->needed);
    r->others = epoll_create1(EPOLL_CLOEXEC);
    r->buffers = buffers_new(largest + 4 * TM_PAGE); /* headers, and a page cut off */
    int rc = hits_init(&r->hits, largest) | passing_init(&r->passing, device, ours, theirs, r->buffers);
    waiting_init(&r->waiting, &r->hits, &r->passing, quick_us);
    ends_init(&r->ends);
    rc |= shortcut_init(&r->shortcut);
    if (rc || !r->buffers || !desk_fill(r, &r->desk)) {
        reader_free(r);
        errno = ENOMEM;
        return NULL;
    }
    if (r->others < 0 || watch(r->others, ours) || watch(r->others, theirs)
        || watch(r->others, r->shortcut.event)) {
        int error = errno;
        reader_free(r);
        errno = error;
        return NULL;
    }
    for (unsigned i = 0; i < helpers && i < HELPERS_MOST; i++) {
        struct helper *h = &r->helpers[i];
        h->reader = r;
        if (reader_thread(&h->thread, help, h))
            break; /* fewer will do */
        r->nhelpers++;
    }
    r->standin.reader = r;
    r->away_ms = away_ms;
    r->has_standin = away_ms && reader_thread(&r->standin.thread, stand_in, &r->standin) == 0;
    return r;
}

int reader_use_rings(struct reader *r, struct rings *rings)
{
    r->rings = rings;
    r->ring_desks = calloc(rings_count(rings), sizeof *r->ring_desks);
    return rings_start(rings, r->device, r->ring_desks ? take_from_ring : NULL, r);
}

void reader_free(struct reader *r)
{
    pthread_mutex_lock(&r->sleep_lock);
    r->ending = true;
    pthread_cond_broadcast(&r->awake);
    pthread_cond_signal(&r->needed);
    pthread_mutex_unlock(&r->sleep_lock);
    atomic_store(&r->paused, true);
    for (unsigned i = 0; i < r->nhelpers; i++)
        pthread_join(r->helpers[i].thread, NULL);
    if (r->has_standin)
        pthread_join(r->standin.thread, NULL);
    waiting_end(&r->waiting);
    if (r->rings) /* only now: they commit what those have answered */
        rings_stop(r->rings);
    waiting_free(&r->waiting);
    for (unsigned i = 0; r->ring_desks && i < rings_count(r->rings); i++)
        desk_clear(&r->ring_desks[i]);
    free(r->ring_desks);
    rings_free(r->rings);
    if (r->others >= 0)
        close(r->others);
    hits_free(&r->hits);
    passing_free(&r->passing);
    if (atomic_load(&r->nodes))
        nodes_drop(atomic_load(&r->nodes));
    ends_free(&r->ends);
    shortcut_free(&r->shortcut);
    desk_clear(&r->desk);
    ahead_clear(&r->ahead);
    buffers_free(r->buffers);
    pthread_mutex_destroy(&r->sleep_lock);
    pthread_cond_destroy(&r->awake);
    pthread_cond_destroy(&r->needed);
    free(r);
}

void reader_drain(struct reader *r) { passing_drain(&r->passing); }

struct shortcut *reader_shortcut(struct reader *r) { return &r->shortcut; }

struct asked *reader_asked(struct reader *r)
{
    struct fuse_in_header in;
    struct asked *a;
    while ((a = shortcut_take(&r->shortcut))) {
        memcpy(&in, a->bytes, sizeof in);
        if (passing_wants_held(&r->passing, in.unique)) /* a FORGET is no flight */
            break;
        free(a);
    }
    return a;
}

void reader_reply(struct reader *r, uint64_t unique, int error, const void *bytes, size_t length)
{
    passing_reply(&r->passing, unique, error, bytes, length);
}

void reader_enter(struct reader *r, uint64_t unique, const struct stat *st, uint64_t nodeid, uint64_t generation,
                  bool stored_to)
{
    struct fuse_entry_out out = {.nodeid = nodeid, .generation = generation};
    struct lifetimes lifetimes;
    nodes_lifetimes(atomic_load(&r->nodes), &lifetimes);
    (void)put_looked_up(&lifetimes, st, &out);
    out.attr.ino = nodeid;
    if (stored_to)
        out.attr_valid = out.attr_valid_nsec = 0;
    passing_reply(&r->passing, unique, 0, &out, sizeof out);
}

bool reader_full(const struct reader *r) { return passing_full(&r->passing); }

struct buffer *reader_take(struct reader *r, size_t least) { return buffer_take(r->buffers, least); }

uint64_t reader_send(struct reader *r, struct buffer *b, size_t start, size_t length)
{
    return buffers_send(r->buffers, b, start, length);
}

struct buffer *reader_payload(struct reader *r, uint64_t number, size_t *start, size_t *length)
{
    return passing_payload(&r->passing, number, start, length);
}

void reader_set_nodes(struct reader *r, struct nodes *nodes, bool answers)
{
    if (atomic_load(&r->nodes))
        return;
    nodes_hold(nodes);
    atomic_store(&r->nodes, nodes);
    atomic_store_explicit(&r->answering, answers ? nodes : NULL, memory_order_release);
}

int reader_page(struct reader *r, uint64_t number, double name, struct page *p, uint64_t *offset)
{
    struct nodes *nodes = atomic_load(&r->nodes);
    uint32_t size;
    if (!nodes || !passing_asks_for(&r->passing, number, offset, &size))
        return EINVAL;
    struct buffer *b = buffer_take(r->buffers, sizeof(struct fuse_out_header) + size);
    if (!b)
        return ENOMEM;
    page_begin(p, b, size, nodes, name);
    return 0;
}

bool reader_list(struct reader *r, uint64_t number, const struct page *p)
{
    return passing_list(&r->passing, number, p->buffer, p->length);
}

void reader_ends(struct reader *r, uint64_t fh, uint64_t number) { ends_note(&r->ends, fh, number); }

void reader_pause(struct reader *r, bool paused) { atomic_store(&r->paused, paused); }

bool reader_quiet(struct reader *r)
{
    struct pollfd p[2] = {{.fd = r->ours, .events = POLLIN}, {.fd = r->theirs, .events = POLLIN}};
    pthread_mutex_lock(&r->sleep_lock);
    bool asleep = !atomic_load(&r->active) && !r->calls;
    pthread_mutex_unlock(&r->sleep_lock);
    /* In this order: each gives what it has in hand to the next. */
    return asleep && waiting_quiet(&r->waiting) && shortcut_quiet(&r->shortcut) && passing_quiet(&r->passing)
        && poll(p, 2, 0) == 0;
}

void reader_set_pool(struct reader *r, const struct tm_handle *pool) { hits_use(&r->hits, pool); }

int reader_open(struct reader *r, uint64_t fh, int fd, struct gate *gate, bool local)
{
    return files_add(&r->hits.files, fh, fd, gate, local);
}

bool reader_close(struct reader *r, uint64_t fh) { return files_remove(&r->hits.files, fh); }

bool reader_follows(struct reader *r, uint64_t fh, uint64_t offset) { return files_follows(&r->hits.files, fh, offset); }

void reader_mark(struct reader *r, uint64_t fh, uint64_t offset) { files_mark(&r->hits.files, fh, offset); }

int reader_pass_through(struct reader *r, uint64_t fh, int32_t backing_id)
{
    return amend_file(&r->passing.amendments, fh, backing_id);
}

int reader_keep_listing(struct reader *r, uint64_t fh, bool believe)
{
    return amend_listing(&r->passing.amendments, fh, believe);
}

void reader_counters(struct reader *r, struct reader_counters *out)
{
    out->hit_reads = atomic_load(&r->hits.reads);
    out->hit_pages = atomic_load(&r->hits.pages);
    out->hit_bytes = atomic_load(&r->hits.bytes);
    out->ahead_reads = atomic_load(&r->hits.ahead_reads);
    out->miss_reads = atomic_load(&r->hits.miss_reads);
    out->miss_pages = atomic_load(&r->hits.miss_pages);
    out->lower_ns = atomic_load(&r->hits.lower_ns);
    out->put_ns = atomic_load(&r->hits.put_ns);
    out->put_pages = atomic_load(&r->hits.put_pages);
    out->refused_pages = atomic_load(&r->hits.refused_pages);
    out->overtaken_pages = atomic_load(&r->hits.overtaken_pages);
    out->forwarded = atomic_load(&r->passing.passed);
    out->given_up = atomic_load(&r->passing.given_up);
    out->attributes = atomic_load(&r->attributes);
    out->ends = atomic_load(&r->ended);
    out->woken = atomic_load(&r->woken);
}
