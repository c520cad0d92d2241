/* A reader's life, and what Python tells and asks of it. See reader.h. */
#include "reader_clock.h"
#include "reader_inside.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

/* ---- Beginning and end ------------------------------------------------------------------------------------- */

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
    pthread_mutex_init(&r->leads, NULL);
    pthread_cond_init(&r->awake, NULL);
    clocked_cond_init(&r->needed);
    r->others = epoll_create1(EPOLL_CLOEXEC);
    sentry_init(&r->sentry, device, r->others);
    r->buffers = buffers_new(largest + 4 * TM_PAGE); /* headers, and a page cut off */
    int rc = hits_init(&r->hits, largest) | passing_init(&r->passing, device, ours, theirs, r->buffers);
    waiting_init(&r->waiting, &r->hits, &r->passing, quick_us);
    waiting_init(&r->asking, &r->hits, &r->passing, quick_us);
    ahead_init(&r->ahead, &r->hits);
    piped_init(&r->piped, device, largest);
    ends_init(&r->ends);
    onlookers_init(&r->onlookers, &r->shortcut);
    onlookers_init(&r->openers, &r->shortcut);
    rc |= shortcut_init(&r->shortcut);
    if (rc || !r->buffers || !desk_fill(r, &r->desk)) {
        reader_free(r);
        errno = ENOMEM;
        return NULL;
    }
    if (r->others < 0 || reader_watch(r->others, ours) || reader_watch(r->others, theirs)
        || reader_watch(r->others, r->shortcut.event)) {
        int error = errno;
        reader_free(r);
        errno = error;
        return NULL;
    }
    for (unsigned i = 0; i < helpers && i < HELPERS_MOST; i++) {
        struct helper *h = &r->helpers[i];
        h->reader = r;
        if (reader_thread(&h->thread, reader_help, h))
            break; /* fewer will do */
        r->nhelpers++;
    }
    r->standin.reader = r;
    r->away_ms = away_ms;
    r->has_standin = away_ms && reader_thread(&r->standin.thread, reader_stand_in, &r->standin) == 0;
    return r;
}

void reader_watched(struct reader *r) { atomic_store(&r->watched, true); }

int reader_use_rings(struct reader *r, struct rings *rings)
{
    r->rings = rings;
    r->ring_desks = calloc(rings_count(rings), sizeof *r->ring_desks);
    return rings_start(rings, r->device, r->ring_desks ? reader_take_from_ring : NULL, r);
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
    ahead_free(&r->ahead);
    piped_free(&r->piped);
    waiting_end(&r->waiting);
    waiting_end(&r->asking);
    onlookers_end(&r->onlookers);
    onlookers_end(&r->openers);
    if (r->rings) /* only now: they commit what those have answered */
        rings_stop(r->rings);
    waiting_free(&r->waiting);
    waiting_free(&r->asking);
    for (unsigned i = 0; r->ring_desks && i < rings_count(r->rings); i++)
        desk_clear(&r->ring_desks[i]);
    free(r->ring_desks);
    rings_free(r->rings);
    sentry_free(&r->sentry);
    if (r->others >= 0)
        close(r->others);
    hits_free(&r->hits);
    passing_free(&r->passing);
    if (atomic_load(&r->nodes))
        nodes_drop(atomic_load(&r->nodes));
    if (r->opens)
        opens_drop(r->opens);
    if (r->listings)
        listings_drop(r->listings);
    ends_free(&r->ends);
    onlookers_free(&r->onlookers);
    onlookers_free(&r->openers);
    shortcut_free(&r->shortcut);
    desk_clear(&r->desk);
    buffers_free(r->buffers);
    pthread_mutex_destroy(&r->sleep_lock);
    pthread_mutex_destroy(&r->leads);
    pthread_cond_destroy(&r->awake);
    pthread_cond_destroy(&r->needed);
    free(r);
}

void reader_rest(struct reader *r, bool all)
{
    ahead_rest(&r->ahead, all);
    piped_rest(&r->piped, all);
    desk_clear(&r->desk);
    buffers_rest(r->buffers);
}

/* ---- What Python tells and asks --------------------------------------------------------------------------- */

void reader_drain(struct reader *r) { passing_drain(&r->passing); }

struct shortcut *reader_shortcut(struct reader *r) { return &r->shortcut; }

bool reader_reply(struct reader *r, uint64_t unique, int error, const void *bytes, size_t length)
{
    return passing_reply(&r->passing, unique, error, bytes, length);
}

bool reader_fetch(struct reader *r, int directory, const char *const *names, unsigned n, struct asked *asked)
{
    return onlookers_start(&r->onlookers, atomic_load(&r->nodes), LOOK_AT_NAMES, directory, names, n, asked);
}

bool reader_open_in_thread(struct reader *r, int node, int flags, struct asked *asked)
{
    asked->flags = flags;
    return onlookers_start(&r->openers, atomic_load(&r->nodes), OPEN_FILE, node, NULL, 0, asked);
}

bool reader_full(const struct reader *r) { return passing_full(&r->passing); }

struct buffer *reader_take(struct reader *r, size_t least) { return buffer_take(r->buffers, least); }

uint64_t reader_send(struct reader *r, struct buffer *b, size_t start, size_t length, int error)
{
    return buffers_send(r->buffers, b, start, length, error);
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

void reader_set_opens(struct reader *r, struct opens *opens)
{
    if (r->opens)
        return;
    opens_hold(opens);
    r->opens = opens;
}

void reader_set_listings(struct reader *r, struct listings *listings)
{
    if (r->listings)
        return;
    listings_hold(listings);
    r->listings = listings;
}

void reader_pause(struct reader *r, bool paused) { atomic_store(&r->paused, paused); }

bool reader_quiet(struct reader *r)
{
    struct pollfd p[2] = {{.fd = r->ours, .events = POLLIN}, {.fd = r->theirs, .events = POLLIN}};
    pthread_mutex_lock(&r->sleep_lock);
    bool asleep = !atomic_load(&r->active) && !r->calls;
    pthread_mutex_unlock(&r->sleep_lock);
    /* In this order: each gives what it has in hand to the next. */
    return asleep && waiting_quiet(&r->waiting) && waiting_quiet(&r->asking) && shortcut_quiet(&r->shortcut) && passing_quiet(&r->passing)
        && poll(p, 2, 0) == 0;
}

void reader_set_pool(struct reader *r, const struct tm_handle *pool) { hits_use(&r->hits, pool); }

int reader_open(struct reader *r, uint64_t fh, int fd, struct gate *gate, bool local)
{
    return files_add(&r->hits.files, fh, fd, gate, local);
}

bool reader_close(struct reader *r, uint64_t fh) { return files_remove(&r->hits.files, fh); }

bool reader_follows(struct reader *r, uint64_t fh, uint64_t offset) { return files_follows(&r->hits.files, fh, offset); }

void reader_stream(struct reader *r, uint64_t fh, uint64_t at) { files_stream(&r->hits.files, fh, at); }

void reader_mark(struct reader *r, uint64_t fh, uint64_t offset, uint64_t end) { files_mark(&r->hits.files, fh, offset, end); }

uint64_t reader_position(struct reader *r, uint64_t fh) { return files_position(&r->hits.files, fh); }

void reader_note(struct reader *r, uint64_t fh) { files_note(&r->hits.files, fh); }

int reader_pass_through(struct reader *r, uint64_t fh, int32_t backing_id)
{
    return amend_file(&r->passing.amendments, fh, backing_id);
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
    out->lookups = atomic_load(&r->lookups);
    out->woken = atomic_load(&r->woken);
    out->found_awake = atomic_load(&r->found_awake) + (r->rings ? rings_found_awake(r->rings) : 0);
    out->read_sleeps = atomic_load(&r->sentry.posts);
    out->opens = atomic_load(&r->nopens);
    out->closes = atomic_load(&r->ncloses);
}
