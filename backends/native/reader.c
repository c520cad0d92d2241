/* Who reads requests, and when: the event loop's thread, its helpers, and who stands in for it. See reader.h. */
#include "reader_inside.h"

#include "reader_clock.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum {
    HELPER_PATIENCE_MS = 2, /* for which a helper waits for more before it sleeps */
    POLL_EVERY = 32,        /* requests, of those that need no waiting: replies and the event loop want to be seen */
    LOOK_EVERY = 8,         /* requests: whether more than one waits */
    LARGE_BYTES = 256 << 10, /* whose decompression takes longer than to wake a helper */
    BURST = 64,             /* requests of a call that may not wait */
    FULL_MS = 10,           /* between two looks for room where no event tells */
    QUICK_NAME_NS = 200000, /* in which a name is looked up that does not wait for a disk; after others the event loop has a turn */
    REST_MS = 1000,         /* after which memory that was not used goes back: to get it again costs some 0.2 ms */
    POLL_MS = 50,           /* of the stand-in: so long it may take to notice that it is not needed any more */
    TOGETHER = 4,           /* hits that are answered together at most */
    SLEEPS_AFTER = 32,      /* requests in a row that were answered here: then it sleeps in read */
    SMALL_BYTES = 16 << 10, /* of a READ that may wait for others: some 5 us */
    SMALL_ROOM = SMALL_BYTES + TM_PAGE, /* for its pages, wherever in the first it begins */
};

/* ---- Buffers ---------------------------------------------------------------------------------------------- */

bool desk_fill(struct reader *r, struct desk *d)
{
    if (!d->request)
        d->request = buffer_take(r->buffers, 0);
    if (!d->data)
        d->data = buffer_take(r->buffers, 0);
    return d->request && d->data;
}

void desk_clear(struct desk *d)
{
    if (d->request)
        buffer_drop(d->request);
    if (d->data)
        buffer_drop(d->data);
    if (d->together)
        buffer_drop(d->together);
    *d = (struct desk){0};
}

/* ---- Helpers ---------------------------------------------------------------------------------------------- */

static bool is_readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) > 0;
}

static bool more_waits(const struct reader *r) { return is_readable(r->device); }

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
    sentry_relieve(&r->sentry);
    pthread_mutex_lock(&r->sleep_lock);
    if (atomic_load(&r->idle) > r->calls) {
        r->calls++;
        atomic_fetch_add_explicit(&r->woken, 1, memory_order_relaxed);
        pthread_cond_signal(&r->awake);
    }
    pthread_mutex_unlock(&r->sleep_lock);
}

/* Small hits keep one CPU busy and their programs another: where there is one helper, there are two CPUs, and it takes the
 * programs' (4 clients: 9.1 us and 12.2 of CPU a hit with a helper, 8.3 and 8.1 without). */
static void wake_helper_for_small(struct reader *r)
{
    if (r->nhelpers > 1)
        wake_helper(r);
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

void reader_leave(struct reader *r)
{
    sentry_step_down(&r->sentry); /* the stand-in may read from now on */
    atomic_fetch_add(&r->turns, 1);
    wake_standin(r);
}

void reader_return(struct reader *r)
{
    atomic_fetch_add(&r->turns, 1);
    if (atomic_load(&r->hits.doubts))
        atomic_store(&r->hits.doubts, false);
}

/* NONE: there was no request, or it is left where it is. ELSEWHERE: another thread answers it, or passes it on. HELD: its
 * answer is to be sent. WAITED: answered, but it took a while. GIVEN: a thread waits for the lower and answers it. */
enum taken {
    TAKEN_NONE, TAKEN_ANSWERED, TAKEN_WAITED, TAKEN_HELD, TAKEN_GIVEN, TAKEN_ELSEWHERE, TAKEN_PASSED_ON, TAKEN_ASKED, TAKEN_GONE
};

/* Answers to small READs that are going to be sent, one right after the other. */
struct together {
    uint8_t *data; /* SMALL_ROOM for the pages of each */
    unsigned count;
    struct {
        uint64_t unique;
        struct answer answer;
    } held[TOGETHER];
};

static void send_together(struct reader *r, struct together *all)
{
    for (unsigned i = 0; all && i < all->count; i++)
        reply_bytes(&r->passing, NULL, all->held[i].unique, all->held[i].answer.bytes, all->held[i].answer.length);
    if (all)
        all->count = 0;
}

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
        const struct fuse_getattr_in *question = argument; /* of an open file: by a read, which wants to know its size */
        bool hidden = length >= sizeof *in + sizeof *question && question->getattr_flags & FUSE_GETATTR_FH;
        if (!nodes || !nodes_attributes(nodes, in->nodeid, hidden, out))
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

/* Whether what was missed is put after the reply: where the program goes on meanwhile, on a CPU of its own. On one CPU it would
 * have to wait for its turn again. */
static bool replies_first(const struct reader *r) { return eager_pays(&r->eager_hits); }

/* Have a thread ask for attributes that only the lower can tell, and may not. */
static bool ask_lower(struct reader *r, const struct fuse_in_header *in, size_t length, struct entry *entry)
{
    struct nodes *nodes = atomic_load(&r->nodes);
    bool local = atomic_load_explicit(&r->answering, memory_order_acquire);
    if (in->opcode != FUSE_GETATTR || !nodes || !waiting_ask(&r->asking, nodes, local, in, length, entry))
        return false;
    atomic_fetch_add_explicit(&r->attributes, 1, memory_order_relaxed);
    look_after_interrupts(r);
    return true;
}

static void leave(void *r) { reader_leave(r); }
static void come_back(void *r) { reader_return(r); }

/* Find the answer to a READ. Whoever leads may wait for the lower and answer it at once, which is `done` then, and is away from
 * requests meanwhile, so that the stand-in comes if it takes long. */
static enum found find_read(struct reader *r, struct desk *d, size_t length, bool leads, uint8_t *data, struct answer *answer,
                            bool *done)
{
    const struct fuse_read_in *read_in = (const void *)(d->request->data + sizeof(struct fuse_in_header));
    enum found found = FOUND;
    *done = false;
    if (leads && ahead_has(&r->ahead, &r->hits, read_in, answer))
        return FOUND;
    if (!leads || r->several || !waiting_is_quick(&r->waiting))
        return hits_find(&r->hits, read_in, data, false, answer);
    *done = waiting_find(&r->waiting, &d->request, data, length, &(struct away){leave, come_back, r}, replies_first(r), &found, answer);
    return found;
}

/* Answer a LOOKUP, or take in a FORGET, if the table can (else TAKEN_NONE); away from requests meanwhile, for the lower may not
 * answer. A LOOKUP is a flight, so that it can be given up. */
static enum taken take_name(struct reader *r, const struct fuse_in_header *in, size_t length)
{
    struct fuse_forget_in forget;
    if ((in->opcode != FUSE_LOOKUP && in->opcode != FUSE_FORGET) || !atomic_load(&r->nodes)
        || !shortcut_takes(&r->shortcut, in, length))
        return TAKEN_NONE;
    if (in->opcode == FUSE_FORGET) {
        memcpy(&forget, in + 1, sizeof forget);
        if (r->opens && opens_knows(r->opens, in->nodeid))
            return TAKEN_NONE; /* Python may have to learn of it first */
        return reader_take_back(r, in->nodeid, forget.nlookup) ? TAKEN_ANSWERED : TAKEN_NONE;
    }
    if (!passing_hold(&r->passing, in, length, NULL))
        return TAKEN_NONE;
    look_after_interrupts(r);
    uint64_t began_ns = timing_now();
    reader_leave(r);
    bool answered = reader_look_up(r, in->unique, in->nodeid, (const char *)(in + 1), false);
    reader_return(r);
    if (!answered) { /* threads are to fetch it */
        if (!shortcut_put(&r->shortcut, NULL, in, length, NULL, true))
            (void)passing_reply(&r->passing, in->unique, ENOMEM, NULL, 0);
        return TAKEN_ASKED;
    }
    atomic_fetch_add_explicit(&r->lookups, 1, memory_order_relaxed);
    return timing_now() - began_ns < QUICK_NAME_NS ? TAKEN_ANSWERED : TAKEN_WAITED;
}

/* The same of an OPEN or a RELEASE. */
static enum taken take_open(struct reader *r, struct desk *d, size_t length)
{
    const struct fuse_in_header *in = (const void *)d->request->data;
    if (reader_close_here(r, in, length, false))
        return TAKEN_ANSWERED;
    if (!reader_may_open(r, in, length) || !passing_hold(&r->passing, in, length, NULL))
        return TAKEN_NONE;
    look_after_interrupts(r);
    if (reader_open_here(r, in, length))
        return TAKEN_ANSWERED;
    if (shortcut_put(&r->shortcut, NULL, in, length, NULL, true))
        return TAKEN_ASKED;
    passing_pass_held(&r->passing, &d->request, length);
    return TAKEN_ELSEWHERE;
}

/* The same of what is asked of directories. */
static enum taken take_listing(struct reader *r, const struct fuse_in_header *in, size_t length)
{
    if (!reader_lists(r, in, length) || !passing_hold(&r->passing, in, length, NULL))
        return TAKEN_NONE;
    look_after_interrupts(r);
    uint64_t began_ns = timing_now();
    reader_leave(r);
    reader_list_here(r, in, length, NULL);
    reader_return(r);
    return timing_now() - began_ns < QUICK_NAME_NS ? TAKEN_ANSWERED : TAKEN_WAITED;
}

/* `leads`: for the event loop's thread, which wakes helpers. `all`: has room for a small hit, which is not answered then; what
 * it has is sent before anything else is done. NULL: there is none. */
static enum taken take(struct reader *r, struct desk *d, bool leads, struct together *all)
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
    /* Before the answer: after it one client is enough. Nobody waits for a RELEASE, so who sent it has sent more. */
    if (leads && !all && in->opcode != FUSE_RELEASE && r->looks++ % LOOK_EVERY == 0) {
        r->several = more_waits(r); /* a read that finds nothing costs what it would have saved */
        if (r->several)
            wake_helper_for_small(r);
    }
    const struct fuse_read_in *read_in = (const void *)(in + 1);
    bool reads = length >= sizeof *in + sizeof *read_in && in->opcode == FUSE_READ;
    bool holds = all && reads && read_in->size <= SMALL_BYTES;
    if (!holds)
        send_together(r, all);
    if (reads) {
        if (leads && read_in->size >= LARGE_BYTES && more_waits(r))
            wake_helper(r);
        struct answer answer;
        uint8_t *data = holds ? all->data + (size_t)all->count * SMALL_ROOM : d->data->data;
        bool done;
        enum found found = find_read(r, d, length, leads, data, &answer, &done);
        if (done)
            return TAKEN_ANSWERED;
        bool unput = found == FOUND && answer.unput.missed.gate;
        if (unput && !(leads && replies_first(r))) /* else whoever leads could close the file */
            hits_put(&r->hits, &answer);
        if (found == FOUND && holds && !unput) {
            all->held[all->count].unique = in->unique;
            all->held[all->count++].answer = answer;
            return TAKEN_HELD;
        }
        send_together(r, all);
        if (found == FOUND) {
            bool next = leads && ahead_expects(&r->ahead, read_in);
            if (next)
                ahead_begin(&r->ahead, &r->hits, read_in, !has_one_cpu(r));
            if (!leads || !piped_reply(&r->piped, in->unique, answer.bytes, answer.length))
                reply_bytes(&r->passing, NULL, in->unique, answer.bytes, answer.length);
            hits_put(&r->hits, &answer);
            /* Where the client has a CPU of its own, it works meanwhile, and it may have one though we have but one; where it has not,
             * this is only done sooner. */
            if (next)
                ahead_fetch(&r->ahead, more_waits(r));
            return TAKEN_ANSWERED;
        }
        if (found == FOUND_IF_WAITING && waiting_give(&r->waiting, &d->request, &d->data, length, NULL)) {
            look_after_interrupts(r);
            return TAKEN_GIVEN;
        }
    }
    struct fuse_attr_out at_hand;
    size_t size;
    uint64_t changes = passing_changes(&r->passing);
    if (find_at_hand(r, in, in + 1, length, &at_hand, &size)) {
        if (leads || !size) /* who leads answers changes, too, so none meanwhile */
            reply_bytes(&r->passing, NULL, in->unique, (const uint8_t *)&at_hand, size);
        else
            passing_tell_since(&r->passing, in->unique, changes, &at_hand);
        return TAKEN_ANSWERED;
    }
    if (ask_lower(r, in, length, NULL))
        return TAKEN_GIVEN;
    enum taken opened = leads ? take_open(r, d, length) : TAKEN_NONE;
    if (opened != TAKEN_NONE)
        return opened;
    enum taken named = leads ? take_name(r, in, length) : TAKEN_NONE;
    if (named != TAKEN_NONE)
        return named;
    enum taken listed = leads ? take_listing(r, in, length) : TAKEN_NONE;
    if (listed != TAKEN_NONE)
        return listed;
    if (leads && atomic_load_explicit(&r->idle, memory_order_relaxed) && more_waits(r))
        wake_helper(r); /* Python is going to be busy */
    if (shortcut_put(&r->shortcut, &r->passing, in, length, NULL, leads)) {
        look_after_interrupts(r);
        return TAKEN_ASKED;
    }
    enum passed passed = pass_on(&r->passing, &d->request, length, NULL);
    look_after_interrupts(r);
    return passed == PASSED ? TAKEN_PASSED_ON : TAKEN_ELSEWHERE;
}

/* Where several wait, answer small hits together: the first reply has to wake a CPU that has halted, the others find it
 * awake. One by one, each has to if its program is done with it before the next is there: a third of what a hit takes.
 * `more`: whether others may be left. */
static enum taken take_together(struct reader *r, bool *more)
{
    struct desk *d = &r->desk;
    if (!d->together && !(d->together = buffer_take(r->buffers, TOGETHER * SMALL_ROOM)))
        return take(r, d, true, NULL);
    struct together all = {.data = d->together->data, .count = 0};
    enum taken t = TAKEN_HELD;
    while (t == TAKEN_HELD && all.count < TOGETHER)
        t = take(r, d, true, &all);
    unsigned held = all.count;
    if (t == TAKEN_NONE) {
        *more = false;
        if (held)
            r->several = held > 1;
    } else if (t == TAKEN_HELD) {
        wake_helper_for_small(r);
    }
    send_together(r, &all);
    return held ? TAKEN_ANSWERED : t;
}

/* The same for what a ring has brought. */
bool reader_take_from_ring(void *with, unsigned ring, struct entry *e)
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
            hits_put(&r->hits, &answer);
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
    if (in->opcode == FUSE_FORGET) { /* of an entry of a listing that the kernel did not take in: by a ring it waits for that */
        if (!shortcut_put(&r->shortcut, &r->passing, in, length, NULL, false))
            (void)pass_on(&r->passing, &d->request, length, NULL);
        entry_fill(e, 0, NULL, 0);
        return true;
    }
    if (ask_lower(r, in, length, e))
        return false;
    if (!shortcut_put(&r->shortcut, &r->passing, in, length, e, false)
        && (found != FOUND_IF_WAITING || !waiting_give(&r->waiting, &d->request, &d->data, length, e)))
        (void)pass_on(&r->passing, &d->request, length, e);
    look_after_interrupts(r);
    return false;
}

int reader_watch(int epoll, int fd)
{
    struct epoll_event event = {.events = EPOLLIN};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void set_wake(struct reader *r, int wake)
{
    if (r->wake >= 0)
        (void)epoll_ctl(r->others, EPOLL_CTL_DEL, r->wake, NULL);
    r->wake = wake >= 0 && reader_watch(r->others, wake) == 0 ? wake : -1;
}

/* One of the others is readable: pass replies on; what there is for the caller, if anything. */
static bool look_at_others(struct reader *r, enum reader_event *event, unsigned *served)
{
    struct pollfd p[4] = {{.fd = r->ours, .events = POLLIN},
                          {.fd = r->theirs, .events = POLLIN},
                          {.fd = r->wake, .events = POLLIN},
                          {.fd = r->shortcut.event, .events = POLLIN}};
    (void)poll(p, 4, 0);
    if (p[0].revents)
        passing_drain(&r->passing);
    bool asked = p[3].revents && reader_asks(r, served) && (!p[1].revents || r->looks++ % 2); /* neither kind waits for all of the other */
    *event = asked ? READER_ASKED : p[1].revents ? READER_REQUEST : READER_NOTHING;
    return *event != READER_NOTHING || p[2].revents;
}

/* Whether helpers and stand-in leave the device alone until the caller wakes or leaves it to them. */
static bool reads_alone(struct reader *r)
{
    pthread_mutex_lock(&r->sleep_lock);
    bool alone = !atomic_load(&r->active) && !r->calls;
    pthread_mutex_unlock(&r->sleep_lock);
    return alone;
}

/* Sleep in read from now on, if that may be and pays: where nothing but hits came lately, one at a time, whose program does not run
 * beside this thread. */
static bool sleeps_in_read(struct reader *r, int64_t until_ms)
{
    return !r->rings && !eager_pays(&r->eager_hits) && (sentry_is_posted(&r->sentry) || reads_alone(r))
        && sentry_post(&r->sentry, until_ms);
}

static enum reader_event serve(struct reader *r, int wake, int timeout_ms)
{
    int64_t now = timeout_ms > 0 ? now_ms() : 0, until = timeout_ms > 0 ? now + timeout_ms : INT64_MAX;
    enum reader_event event = READER_NOTHING;
    unsigned served = 0, looked = 0, in_a_row = 0;
    bool flows = false; /* there is probably another request: do not wait for it */
    struct eager *e = r->python_last ? &r->eager_python : &r->eager_hits; /* they come at different times */
    eager_end(e);
    if (timeout_ms && r->python_last)
        eager_answered(e, timing_now());
    if (now - r->rested_ms >= REST_MS) {
        reader_rest(r, false);
        r->rested_ms = now;
    }
    if (wake != r->wake)
        set_wake(r, wake);
    if (passing_expects(&r->passing))
        passing_drain(&r->passing);
    for (;;) {
        bool full = passing_full(&r->passing);
        bool eager = !full && !flows && eager_tries(e) && eager_looks(e, timing_now());
        /* The sentry has to get a CPU before it can call: where programs keep it busy, hits would go on for a long time before that. */
        bool asleep = !full && !flows && !eager && timeout_ms && in_a_row >= SLEEPS_AFTER
            && (in_a_row % POLL_EVERY || !is_readable(r->others)) && sleeps_in_read(r, until);
        if (!asleep && flows && !eager_pays(&r->eager_hits) && sentry_holds(&r->sentry))
            sentry_look(&r->sentry);
        else if (!asleep && sentry_relieve(&r->sentry))
            in_a_row = 0;
        if (!asleep && (full || !(flows || eager) || looked++ % POLL_EVERY == 0)) {
            int64_t left = timeout_ms > 0 ? until - now_ms() : timeout_ms;
            if (timeout_ms > 0 && left <= 0)
                return READER_NOTHING; /* whoever set the deadline is due, however many requests wait */
            struct pollfd p[2] = {{.fd = full ? -1 : r->device, .events = POLLIN}, {.fd = r->others, .events = POLLIN}};
            bool looks_again = full && (left < 0 || left > FULL_MS);
            int n = poll(p, 2, eager ? 0 : looks_again ? FULL_MS : (int)left);
            if (!n && eager)
                continue;
            if (!n && looks_again) {
                passing_drain(&r->passing);
                continue;
            }
            if (n <= 0)
                return READER_NOTHING;
            if (p[1].revents && look_at_others(r, &event, &served))
                return event;
            if (timeout_ms == 0 && served >= BURST)
                return READER_NOTHING;
            if (!p[0].revents)
                continue;
        }
        bool more = true;
        enum taken t = r->several && !asleep ? take_together(r, &more) : take(r, &r->desk, true, NULL);
        if (t == TAKEN_NONE && eager)
            continue;
        in_a_row = t == TAKEN_ANSWERED || t == TAKEN_GIVEN ? in_a_row + 1 : 0;
        if (t == TAKEN_NONE && asleep && !sentry_calls(&r->sentry))
            return READER_NOTHING; /* a signal for somebody else */
        if (eager) {
            eager_found(e);
            atomic_fetch_add_explicit(&r->found_awake, 1, memory_order_relaxed);
        }
        if (t == TAKEN_GONE)
            return READER_GONE;
        r->python_last = t == TAKEN_PASSED_ON || t == TAKEN_ASKED;
        if (t == TAKEN_PASSED_ON)
            return READER_REQUEST;
        if (t == TAKEN_ASKED)
            return READER_ASKED;
        served += t == TAKEN_ANSWERED || t == TAKEN_WAITED;
        flows = r->several && more && t == TAKEN_ANSWERED;
        if (t == TAKEN_ANSWERED && timeout_ms)
            eager_answered(e = &r->eager_hits, timing_now());
        if (timeout_ms == 0 && (served >= BURST || t == TAKEN_WAITED))
            return READER_NOTHING;
    }
}

static bool is_away(uint32_t turns) { return turns % 2 == 0; }

unsigned reader_serve(struct reader *r, int wake, int timeout_ms)
{
    reader_return(r); /* the stand-in ends what it does for who leads */
    pthread_mutex_lock(&r->leads);
    sentry_meet(&r->sentry);
    enum reader_event event = serve(r, wake, timeout_ms);
    sentry_relieve(&r->sentry);
    pthread_mutex_unlock(&r->leads);
    reader_leave(r);
    return event | (r->opens && opens_news(r->opens) ? (unsigned)READER_NEWS : 0);
}

void *reader_help(void *arg)
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
            enum taken t = take(r, &h->desk, false, NULL);
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
    atomic_store(&r->rests, true);
    while (!is_away(turns) && atomic_load(&r->turns) == turns && !r->ending && !passing_interrupted(&r->passing))
        pthread_cond_wait(&r->needed, &r->sleep_lock);
    atomic_store(&r->rests, false);
    struct timespec until = ms_from_now(r->away_ms);
    while (!r->ending && pthread_cond_timedwait(&r->needed, &r->sleep_lock, &until) == 0)
        ;
}

/* The event loop's thread stays away, which tells gates what has changed underneath. */
static void doubt(struct reader *r, uint32_t turns)
{
    if (!atomic_load(&r->watched))
        return;
    atomic_store(&r->hits.doubts, true);
    if (atomic_load(&r->turns) != turns) /* it is back, and may not have seen this */
        atomic_store(&r->hits.doubts, false);
}

/* Nothing came for a while. Who leads is elsewhere, or waits in reader_serve for the lower, and then has its memory in use. */
static void rest_instead(struct reader *r, struct desk *d)
{
    desk_clear(d);
    if (pthread_mutex_trylock(&r->leads))
        return;
    reader_rest(r, true);
    pthread_mutex_unlock(&r->leads);
}

static void serve_instead(struct reader *r, struct desk *d, uint32_t turns)
{
    struct pollfd p = {.fd = r->device, .events = POLLIN};
    unsigned quiet = 0; /* times that it found nothing, one after the other */
    while (!atomic_load(&r->paused) && atomic_load(&r->turns) == turns && !passing_full(&r->passing)) {
        int n = poll(&p, 1, POLL_MS);
        if (n < 0 || (n > 0 && take(r, d, false, NULL) == TAKEN_GONE))
            return;
        quiet = n ? 0 : quiet + 1;
        if (quiet == REST_MS / POLL_MS)
            rest_instead(r, d);
        passing_recheck(&r->passing);
    }
}

/* The stand-in: serves as long as the event loop's thread does not come back, because a handler of its own waits for
 * the lower, say. Hits go on; the rest is passed on to where that thread will find it. It also sees to requests that
 * were interrupted, wherever that thread is. */
void *reader_stand_in(void *arg)
{
    struct helper *h = arg;
    struct reader *r = h->reader;
    pthread_mutex_lock(&r->sleep_lock);
    while (!r->ending) {
        uint32_t turns = atomic_load(&r->turns);
        rest(r, turns);
        bool stays_away = is_away(turns) && atomic_load(&r->turns) == turns;
        atomic_fetch_add(&r->active, stays_away);
        if (stays_away) /* with the lock: who comes back looks whether anybody is active before it sleeps in read */
            sentry_look(&r->sentry);
        pthread_mutex_unlock(&r->sleep_lock);
        passing_recheck(&r->passing);
        if (stays_away) {
            doubt(r, turns);
            serve_instead(r, &h->desk, turns);
        }
        desk_clear(&h->desk);
        pthread_mutex_lock(&r->sleep_lock);
        atomic_fetch_sub(&r->active, stays_away);
    }
    pthread_mutex_unlock(&r->sleep_lock);
    return NULL;
}
