/* Reading requests, answering hits, passing the rest on. See reader.h. */
#include "reader.h"

#include "reader_files.h"
#include "reader_notify.h"

#include <errno.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NOTIFY_INC_EPOCH = 8 }; /* Linux 6.16 */
#ifndef FOPEN_PASSTHROUGH /* Linux 6.9; Debian 12's header is older */
#define FOPEN_PASSTHROUGH (1 << 7)
#endif

enum {
    HELPERS_MOST = 8,
    HELPER_PATIENCE_MS = 2, /* for which a helper waits for more before it sleeps */
    POLL_EVERY = 32,        /* requests, of those that need no waiting: replies and the event loop want to be seen */
    LOOK_EVERY = 8,         /* requests: whether more than one waits */
    LARGE_PAGES = 64,       /* whose decompression takes longer than to wake a helper */
    BURST = 64,             /* requests of a call that may not wait */
};

/* One thread's buffers. */
struct desk {
    uint8_t *request, *data;
    size_t kept; /* length of a request in `request` that did not fit into the socket */
};

/* A forwarded request whose reply may have to be amended. */
struct opening {
    struct opening *next;
    uint64_t unique;
    uint32_t opcode;
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
    size_t largest;
    struct files files;
    pthread_rwlock_t pool_lock; /* read while a hit is fetched */
    bool has_pool;
    struct tm_handle pool;
    struct notifier notifier;
    struct desk desk; /* of who calls reader_serve */
    uint8_t *reply;

    pthread_mutex_t amend_lock;
    struct opening *openings;
    struct amendment *amendments;

    pthread_mutex_t sleep_lock;
    pthread_cond_t awake;
    unsigned nhelpers, calls;
    bool ending;
    _Atomic uint32_t idle, active;
    _Atomic bool paused;
    struct helper helpers[HELPERS_MOST];
    uint32_t looks, wakes;
    bool several, one_cpu; /* more than one request waited when it was looked last */

    _Atomic uint64_t hit_reads, hit_pages, hit_bytes, forwarded, woken;
};

/* ---- Buffers ---------------------------------------------------------------------------------------------- */

static uint8_t *buffer_new(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static size_t buffer_size(const struct reader *r) { return r->largest + 4 * TM_PAGE; } /* headers, and a page cut off */

static int desk_init(struct reader *r, struct desk *d)
{
    d->request = buffer_new(buffer_size(r));
    d->data = buffer_new(buffer_size(r));
    return d->request && d->data ? 0 : -1;
}

static void desk_free(struct reader *r, struct desk *d)
{
    if (d->request)
        munmap(d->request, buffer_size(r));
    if (d->data)
        munmap(d->data, buffer_size(r));
}

/* ---- A hit ------------------------------------------------------------------------------------------------ */

static void add(_Atomic uint64_t *counter, uint64_t n) { atomic_fetch_add_explicit(counter, n, memory_order_relaxed); }

static void reply_bytes(struct reader *r, uint64_t unique, const uint8_t *data, size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .unique = unique};
    struct iovec parts[2] = {{&out, sizeof out}, {(void *)data, length}};
    ssize_t ignored = writev(r->device, parts, length ? 2 : 1); /* ENOENT: whoever asked is gone */
    (void)ignored;
}

static int64_t fetch(struct reader *r, const struct target *t, uint32_t first, uint8_t *data, uint32_t npages)
{
    int64_t found = TM_MISS;
    pthread_rwlock_rdlock(&r->pool_lock);
    if (r->has_pool)
        found = tm_get(&r->pool, t->oid, first, data, npages);
    pthread_rwlock_unlock(&r->pool_lock);
    return found;
}

static bool more_waits(const struct reader *r)
{
    struct pollfd p = {.fd = r->device, .events = POLLIN};
    return poll(&p, 1, 0) > 0;
}

static void wake_helper(struct reader *r)
{
    if (!atomic_load_explicit(&r->idle, memory_order_relaxed))
        return;
    if (r->wakes++ % POLL_EVERY == 0) { /* a process may be moved at any time */
        cpu_set_t cpus;
        r->one_cpu = !sched_getaffinity(0, sizeof cpus, &cpus) && CPU_COUNT(&cpus) == 1;
    }
    if (r->one_cpu)
        return;
    pthread_mutex_lock(&r->sleep_lock);
    if (atomic_load(&r->idle) > r->calls) {
        r->calls++;
        add(&r->woken, 1);
        pthread_cond_signal(&r->awake);
    }
    pthread_mutex_unlock(&r->sleep_lock);
}

/* Answer the READ in `d->request` if all its pages are in the pool. */
static bool answer(struct reader *r, struct desk *d, bool leads)
{
    const struct fuse_in_header *in = (const void *)d->request;
    const struct fuse_read_in *read_in = (const void *)(in + 1);
    uint64_t offset = read_in->offset, end = offset + read_in->size;
    struct target t;
    struct stat st;
    if (read_in->size > r->largest || end < offset || end > (UINT64_C(1) << 32) * TM_PAGE
        || !files_find(&r->files, read_in->fh, end, &t))
        return false;
    if (end > t.size) { /* whatever reaches the end asks where that is now */
        if (fstat(t.fd, &st) || (uint64_t)st.st_size != t.size)
            return false;
        end = t.size;
    }
    if (end <= offset) {
        reply_bytes(r, in->unique, NULL, 0);
        return true;
    }
    uint64_t first = offset / TM_PAGE, npages = (end + TM_PAGE - 1) / TM_PAGE - first;
    if (leads && npages >= LARGE_PAGES && more_waits(r))
        wake_helper(r);
    if (fetch(r, &t, (uint32_t)first, d->data, (uint32_t)npages) != (int64_t)npages)
        return false;
    add(&r->hit_reads, 1);
    add(&r->hit_pages, npages);
    add(&r->hit_bytes, end - offset);
    reply_bytes(r, in->unique, d->data + offset % TM_PAGE, end - offset);
    return true;
}

/* ---- What libfuse gets, and says -------------------------------------------------------------------------- */

static bool opens(uint32_t opcode) { return opcode == FUSE_OPEN || opcode == FUSE_OPENDIR || opcode == FUSE_CREATE; }

static void note_opening(struct reader *r, const struct fuse_in_header *in)
{
    struct opening *o = malloc(sizeof *o);
    if (!o)
        return; /* its reply goes out as it is */
    *o = (struct opening){.unique = in->unique, .opcode = in->opcode};
    pthread_mutex_lock(&r->amend_lock);
    o->next = r->openings;
    r->openings = o;
    pthread_mutex_unlock(&r->amend_lock);
}

static void refuse(struct reader *r, const struct fuse_in_header *in)
{
    struct fuse_out_header out = {.len = sizeof out, .error = -EIO, .unique = in->unique};
    ssize_t ignored = write(r->device, &out, sizeof out);
    (void)ignored;
}

enum sent { SENT, SENT_LATER, SENT_NEVER };

/* Pass the request in `d->request` on. SENT_LATER: it did not fit, and whoever may wait for room must try again. */
static enum sent forward(struct reader *r, struct desk *d, size_t length, int flags)
{
    if (!d->kept && opens(((const struct fuse_in_header *)(const void *)d->request)->opcode))
        note_opening(r, (const void *)d->request);
    ssize_t n;
    do
        n = send(r->ours, d->request, length, MSG_NOSIGNAL | flags);
    while (n < 0 && errno == EINTR);
    d->kept = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? length : 0;
    if (n < 0 && !d->kept)
        refuse(r, (const void *)d->request); /* nobody will answer it */
    if (n >= 0)
        add(&r->forwarded, 1);
    return n >= 0 ? SENT : d->kept ? SENT_LATER : SENT_NEVER;
}

static uint32_t take_opening(struct reader *r, uint64_t unique)
{
    uint32_t opcode = 0;
    for (struct opening **p = &r->openings; *p; p = &(*p)->next)
        if ((*p)->unique == unique) {
            struct opening *o = *p;
            *p = o->next;
            opcode = o->opcode;
            free(o);
            break;
        }
    return opcode;
}

static struct amendment *take_amendment(struct reader *r, uint64_t fh, bool listing)
{
    for (struct amendment **p = &r->amendments; *p; p = &(*p)->next)
        if ((*p)->fh == fh && (*p)->listing == listing) {
            struct amendment *a = *p;
            *p = a->next;
            return a;
        }
    return NULL;
}

static void amend(struct reader *r, uint8_t *reply, size_t length)
{
    const struct fuse_out_header *out = (const void *)reply;
    pthread_mutex_lock(&r->amend_lock);
    uint32_t opcode = r->openings ? take_opening(r, out->unique) : 0;
    size_t at = sizeof *out + (opcode == FUSE_CREATE ? sizeof(struct fuse_entry_out) : 0);
    if (opcode && !out->error && length >= at + sizeof(struct fuse_open_out)) {
        struct fuse_open_out open;
        memcpy(&open, reply + at, sizeof open);
        struct amendment *a = take_amendment(r, open.fh, opcode == FUSE_OPENDIR);
        if (a && opcode == FUSE_OPENDIR) {
            open.open_flags |= a->flags;
        } else if (a) {
            open.open_flags = (open.open_flags & ~(uint32_t)(FOPEN_DIRECT_IO | FOPEN_KEEP_CACHE)) | FOPEN_PASSTHROUGH;
            open.padding = (uint32_t)a->backing_id; /* its name in older headers */
        }
        memcpy(reply + at, &open, sizeof open);
        free(a);
    }
    pthread_mutex_unlock(&r->amend_lock);
}

/* A notification that cannot wait for a lock: of an inode's attributes alone, or of all names. */
static bool is_prompt(const uint8_t *message, size_t length)
{
    const struct fuse_out_header *out = (const void *)message;
    struct fuse_notify_inval_inode_out inode;
    if (out->error == NOTIFY_INC_EPOCH)
        return true;
    if (out->error != FUSE_NOTIFY_INVAL_INODE || length < sizeof *out + sizeof inode)
        return false;
    memcpy(&inode, message + sizeof *out, sizeof inode);
    return inode.off < 0;
}

void reader_drain(struct reader *r)
{
    ssize_t n;
    if (r->desk.kept)
        (void)forward(r, &r->desk, r->desk.kept, MSG_DONTWAIT);
    while ((n = recv(r->ours, r->reply, buffer_size(r), MSG_DONTWAIT)) > 0) {
        size_t length = (size_t)n;
        const struct fuse_out_header *out = (const void *)r->reply;
        if (length >= sizeof *out && !out->unique && !is_prompt(r->reply, length)) {
            notifier_send(&r->notifier, r->reply, length);
            continue;
        }
        if (length >= sizeof *out && out->unique)
            amend(r, r->reply, length);
        ssize_t ignored = write(r->device, r->reply, length);
        (void)ignored;
    }
}

/* ---- Reading ---------------------------------------------------------------------------------------------- */

enum taken { TAKEN_NONE, TAKEN_ANSWERED, TAKEN_PASSED_ON, TAKEN_GONE };

static enum taken take(struct reader *r, struct desk *d, bool leads)
{
    ssize_t n = read(r->device, d->request, buffer_size(r));
    if (n < 0)
        return errno == EAGAIN || errno == EINTR || errno == ENOENT ? TAKEN_NONE : TAKEN_GONE;
    if (!n)
        return TAKEN_GONE;
    size_t length = (size_t)n;
    const struct fuse_in_header *in = (const void *)d->request;
    if (leads && r->looks++ % LOOK_EVERY == 0) { /* before the answer: after it one client is enough */
        r->several = more_waits(r); /* a read that finds nothing costs what it would have saved */
        if (r->several)
            wake_helper(r);
    }
    if (length >= sizeof *in + sizeof(struct fuse_read_in) && in->opcode == FUSE_READ && answer(r, d, leads))
        return TAKEN_ANSWERED;
    if (leads && atomic_load_explicit(&r->idle, memory_order_relaxed) && more_waits(r))
        wake_helper(r); /* Python is going to be busy */
    /* Who leads is the one that makes room. What nobody will get must not be waited for. */
    return forward(r, d, length, leads ? MSG_DONTWAIT : 0) == SENT_NEVER ? TAKEN_NONE : TAKEN_PASSED_ON;
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
    struct pollfd p[3] = {{.fd = r->ours, .events = POLLIN},
                          {.fd = r->theirs, .events = POLLIN},
                          {.fd = r->wake, .events = POLLIN}};
    (void)poll(p, 3, 0);
    if (p[0].revents)
        reader_drain(r);
    *event = p[1].revents ? READER_REQUEST : READER_NOTHING;
    return p[1].revents || p[2].revents;
}

enum reader_event reader_serve(struct reader *r, int wake, int timeout_ms)
{
    int64_t until = timeout_ms > 0 ? now_ms() + timeout_ms : 0;
    enum reader_event event = READER_NOTHING;
    unsigned served = 0;
    bool flows = false; /* there is probably another request: do not wait for it */
    if (wake != r->wake)
        set_wake(r, wake);
    reader_drain(r);
    if (r->desk.kept)
        return READER_REQUEST; /* room comes from reading those that are there */
    for (;;) {
        if (!flows || served % POLL_EVERY == 0) {
            int64_t left = timeout_ms > 0 ? until - now_ms() : timeout_ms;
            if (timeout_ms > 0 && left <= 0)
                return READER_NOTHING; /* whoever set the deadline is due, however many requests wait */
            struct pollfd p[2] = {{.fd = r->device, .events = POLLIN}, {.fd = r->others, .events = POLLIN}};
            int n = poll(p, 2, (int)left);
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
        served += t == TAKEN_ANSWERED;
        flows = r->several && t == TAKEN_ANSWERED;
        if (timeout_ms == 0 && served >= BURST)
            return READER_NOTHING;
    }
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
        while (!atomic_load(&r->paused) && (flows || poll(&p, 1, HELPER_PATIENCE_MS) > 0)) {
            enum taken t = take(r, &h->desk, false);
            if (t == TAKEN_GONE)
                break;
            flows = t == TAKEN_ANSWERED;
        }
        pthread_mutex_lock(&r->sleep_lock);
        atomic_fetch_sub(&r->active, 1);
    }
    pthread_mutex_unlock(&r->sleep_lock);
    return NULL;
}

/* ---- Life ------------------------------------------------------------------------------------------------- */

struct reader *reader_new(int device, int ours, int theirs, unsigned helpers, size_t largest)
{
    struct reader *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->device = device;
    r->ours = ours;
    r->theirs = theirs;
    r->wake = -1;
    r->largest = largest;
    pthread_rwlock_init(&r->pool_lock, NULL);
    pthread_mutex_init(&r->amend_lock, NULL);
    pthread_mutex_init(&r->sleep_lock, NULL);
    pthread_cond_init(&r->awake, NULL);
    notifier_init(&r->notifier, device);
    r->reply = buffer_new(buffer_size(r));
    r->others = epoll_create1(EPOLL_CLOEXEC);
    if (r->others < 0 || watch(r->others, ours) || watch(r->others, theirs)) {
        int error = errno;
        reader_free(r);
        errno = error;
        return NULL;
    }
    int rc = files_init(&r->files) | desk_init(r, &r->desk) | (r->reply ? 0 : -1);
    for (unsigned i = 0; !rc && i < helpers && i < HELPERS_MOST; i++) {
        struct helper *h = &r->helpers[i];
        h->reader = r;
        if (desk_init(r, &h->desk) || thread_start(&h->thread, help, h)) {
            desk_free(r, &h->desk);
            break; /* fewer will do */
        }
        r->nhelpers++;
    }
    if (rc) {
        reader_free(r);
        errno = ENOMEM;
        return NULL;
    }
    return r;
}

void reader_free(struct reader *r)
{
    pthread_mutex_lock(&r->sleep_lock);
    r->ending = true;
    pthread_cond_broadcast(&r->awake);
    pthread_mutex_unlock(&r->sleep_lock);
    atomic_store(&r->paused, true);
    (void)shutdown(r->ours, SHUT_RDWR); /* a helper may wait for room that nobody will make */
    for (unsigned i = 0; i < r->nhelpers; i++) {
        pthread_join(r->helpers[i].thread, NULL);
        desk_free(r, &r->helpers[i].desk);
    }
    notifier_free(&r->notifier);
    if (r->others >= 0)
        close(r->others);
    files_free(&r->files);
    for (struct opening *o = r->openings, *next; o; o = next) {
        next = o->next;
        free(o);
    }
    for (struct amendment *a = r->amendments, *next; a; a = next) {
        next = a->next;
        free(a);
    }
    desk_free(r, &r->desk);
    if (r->reply)
        munmap(r->reply, buffer_size(r));
    pthread_rwlock_destroy(&r->pool_lock);
    pthread_mutex_destroy(&r->amend_lock);
    pthread_mutex_destroy(&r->sleep_lock);
    pthread_cond_destroy(&r->awake);
    free(r);
}

void reader_pause(struct reader *r, bool paused) { atomic_store(&r->paused, paused); }

bool reader_quiet(struct reader *r)
{
    struct pollfd p[2] = {{.fd = r->ours, .events = POLLIN}, {.fd = r->theirs, .events = POLLIN}};
    pthread_mutex_lock(&r->sleep_lock);
    bool asleep = !atomic_load(&r->active) && !r->calls;
    pthread_mutex_unlock(&r->sleep_lock);
    return asleep && !r->desk.kept && notifier_quiet(&r->notifier) && poll(p, 2, 0) == 0;
}

void reader_set_pool(struct reader *r, const struct tm_handle *pool)
{
    pthread_rwlock_wrlock(&r->pool_lock);
    r->has_pool = pool != NULL;
    if (pool)
        r->pool = *pool;
    pthread_rwlock_unlock(&r->pool_lock);
}

int reader_open(struct reader *r, uint64_t fh, int fd, struct gate *gate)
{
    return files_add(&r->files, fh, fd, gate);
}

void reader_close(struct reader *r, uint64_t fh) { files_remove(&r->files, fh); }

void reader_mark(struct reader *r, uint64_t fh, uint64_t offset) { files_mark(&r->files, fh, offset); }

static int add_amendment(struct reader *r, struct amendment what)
{
    struct amendment *a = malloc(sizeof *a);
    if (!a)
        return -1;
    *a = what;
    pthread_mutex_lock(&r->amend_lock);
    a->next = r->amendments;
    r->amendments = a;
    pthread_mutex_unlock(&r->amend_lock);
    return 0;
}

int reader_pass_through(struct reader *r, uint64_t fh, int32_t backing_id)
{
    return add_amendment(r, (struct amendment){.fh = fh, .backing_id = backing_id});
}

int reader_keep_listing(struct reader *r, uint64_t fh, bool believe)
{
    uint32_t flags = FOPEN_CACHE_DIR | (believe ? FOPEN_KEEP_CACHE : 0);
    return add_amendment(r, (struct amendment){.fh = fh, .listing = true, .flags = flags});
}

void reader_counters(struct reader *r, struct reader_counters *out)
{
    out->hit_reads = atomic_load(&r->hit_reads);
    out->hit_pages = atomic_load(&r->hit_pages);
    out->hit_bytes = atomic_load(&r->hit_bytes);
    out->forwarded = atomic_load(&r->forwarded);
    out->woken = atomic_load(&r->woken);
}
