/* The reader's table of open files, and gates. Locks are held for a few instructions. */
#include "reader_files.h"

#include "reader_look.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    ENDS = 2,       /* helpers may take two requests of a stream in the wrong order */
    /* Misses that the kernel did not have, one after the other. Fewer would often come in a row where it has every other page, which
     * the lower would then be asked for. */
    COLD_AFTER = 8,
    TRY_EVERY = 128, /* of those that follow: a file that the kernel has come to have costs 10 us more a miss until then */
    PAST_SHARE = 16, /* of the process' limit, for descriptors that are not needed: the rest is for what programs open */
    /* READs by which one of a stream may be early or late: several programs can take its requests by turns, and the kernel
     * sends several of a file that it caches. */
    APART = 8,
};

struct file {
    struct file *next;
    uint64_t fh;
    uint64_t at;   /* where the reader of a stream has come to; NO_STREAM: there is none */
    uint64_t mark; /* the stream's, UINT64_MAX none */
    uint64_t end;  /* read ahead of it to here */
    int fd;
    int past;      /* `files_past_cache` */
    unsigned refs; /* of the table, and who holds it */
    bool local, unnoted;
    bool closes;   /* the descriptor is closed with the last reference */
    unsigned cold; /* misses that the kernel did not have, since the last that it had */
    bool tried;    /* the kernel was to read the last one if it had it */
    unsigned nends;
    uint64_t ends[ENDS]; /* of the last misses */
    struct gate *gate;
};

enum { UNTRIED = -1, NONE = -2 }; /* instead of a descriptor */

struct gate *gate_new(void)
{
    struct gate *g = calloc(1, sizeof *g);
    if (g) {
        atomic_init(&g->refs, 1);
        pthread_mutex_init(&g->lock, NULL);
        pthread_mutex_init(&g->put_lock, NULL);
    }
    return g;
}

void gate_set(struct gate *g, const uint8_t *oid, uint64_t size, bool open, bool takes)
{
    pthread_mutex_lock(&g->put_lock);
    pthread_mutex_lock(&g->lock);
    memcpy(g->oid, oid, TM_OID);
    g->size = size;
    g->open = open;
    g->takes = takes;
    g->trusted = false;
    g->turn += !MUTANT(11);
    pthread_mutex_unlock(&g->lock);
    pthread_mutex_unlock(&g->put_lock);
}

void gate_overtake(struct gate *g)
{
    pthread_mutex_lock(&g->put_lock);
    pthread_mutex_lock(&g->lock);
    g->trusted = false;
    g->turn++;
    pthread_mutex_unlock(&g->lock);
    pthread_mutex_unlock(&g->put_lock);
}

bool stamps_of(const struct stat *st, struct stamps *out)
{
    if (!has_ns(st->st_mtim) || !has_ns(st->st_ctim))
        return false;
    *out = (struct stamps){ns_of(st->st_mtim), ns_of(st->st_ctim), (uint64_t)st->st_size, false};
    return true;
}

void gate_trust(struct gate *g, const struct stamps *s)
{
    pthread_mutex_lock(&g->lock);
    g->trusted = true;
    g->stamps = *s;
    pthread_mutex_unlock(&g->lock);
}

bool gate_shows(struct gate *g, const struct stamps *s)
{
    pthread_mutex_lock(&g->lock);
    const struct stamps *own = &g->stamps;
    bool shows = g->open && g->trusted && g->size == s->size && own->size == s->size && own->mtime_ns == s->mtime_ns
        && own->ctime_ns == s->ctime_ns;
    pthread_mutex_unlock(&g->lock);
    return shows;
}

uint32_t gate_top(struct gate *g)
{
    pthread_mutex_lock(&g->put_lock);
    uint32_t top = g->top;
    pthread_mutex_unlock(&g->put_lock);
    return top;
}

void gate_hold(struct gate *g) { atomic_fetch_add(&g->refs, 1); }

void gate_drop(struct gate *g)
{
    if (atomic_fetch_sub(&g->refs, 1) == 1) {
        pthread_mutex_destroy(&g->lock);
        pthread_mutex_destroy(&g->put_lock);
        free(g);
    }
}

int files_init(struct files *f)
{
    struct rlimit limit;
    f->npast = 0;
    f->most_past = 0;
    if (!getrlimit(RLIMIT_NOFILE, &limit))
        f->most_past = (unsigned)(limit.rlim_cur < UINT32_MAX ? limit.rlim_cur : UINT32_MAX) / PAST_SHARE;
    pthread_mutex_init(&f->lock, NULL);
    f->nbuckets = 256;
    f->count = 0;
    f->buckets = calloc(f->nbuckets, sizeof *f->buckets);
    return f->buckets ? 0 : -1;
}

static void destroy(struct file *one)
{
    if (one->closes)
        close(one->fd);
    if (one->past >= 0 && !MUTANT(45))
        close(one->past);
    gate_drop(one->gate);
    free(one);
}

void files_release(struct files *f, struct file *one)
{
    pthread_mutex_lock(&f->lock);
    bool last = !--one->refs;
    f->npast -= last && one->past >= 0;
    pthread_mutex_unlock(&f->lock);
    if (last)
        destroy(one);
}

void files_free(struct files *f)
{
    for (unsigned i = 0; f->buckets && i < f->nbuckets; i++)
        for (struct file *one = f->buckets[i], *next; one; one = next) {
            next = one->next;
            files_release(f, one);
        }
    free(f->buckets);
    pthread_mutex_destroy(&f->lock);
}

static struct file **place(struct files *f, uint64_t fh)
{
    struct file **p = &f->buckets[fh & (f->nbuckets - 1)]; /* handles are given out one after the other */
    while (*p && (*p)->fh != fh)
        p = &(*p)->next;
    return p;
}

static void grow(struct files *f)
{
    struct file **more = calloc(f->nbuckets * 2, sizeof *more);
    if (!more)
        return; /* longer chains, then */
    for (unsigned i = 0; i < f->nbuckets; i++)
        for (struct file *one = f->buckets[i], *next; one; one = next) {
            struct file **head = &more[one->fh & (f->nbuckets * 2 - 1)];
            next = one->next;
            one->next = *head;
            *head = one;
        }
    free(f->buckets);
    f->buckets = more;
    f->nbuckets *= 2;
}

int files_add(struct files *f, uint64_t fh, int fd, struct gate *gate, bool local)
{
    struct file *one = malloc(sizeof *one);
    if (!one)
        return -1;
    *one = (struct file){.fh = fh, .at = NO_STREAM, .mark = UINT64_MAX, .fd = fd, .past = UNTRIED, .refs = 1, .local = local,
                         .gate = gate};
    gate_hold(gate);
    pthread_mutex_lock(&f->lock);
    if (f->count >= f->nbuckets)
        grow(f);
    struct file **p = place(f, fh), *old = *p;
    if (old)
        one->next = old->next;
    else
        f->count++;
    *p = one;
    pthread_mutex_unlock(&f->lock);
    if (old)
        files_release(f, old);
    return 0;
}

bool files_remove(struct files *f, uint64_t fh)
{
    bool used = false;
    pthread_mutex_lock(&f->lock);
    struct file **p = place(f, fh), *one = *p;
    if (one) {
        *p = one->next;
        f->count--;
        one->closes = used = one->refs > 1;
    }
    pthread_mutex_unlock(&f->lock);
    if (one)
        files_release(f, one);
    return used;
}

struct file *files_hold(struct files *f, uint64_t fh)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one)
        one->refs++;
    pthread_mutex_unlock(&f->lock);
    return one;
}

void files_stream(struct files *f, uint64_t fh, uint64_t at)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one) {
        one->at = one->end = at;
        one->mark = UINT64_MAX;
    }
    pthread_mutex_unlock(&f->lock);
}

void files_mark(struct files *f, uint64_t fh, uint64_t offset, uint64_t end)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one) {
        one->mark = offset;
        one->end = end;
    }
    pthread_mutex_unlock(&f->lock);
}

uint64_t files_position(struct files *f, uint64_t fh)
{
    pthread_mutex_lock(&f->lock);
    const struct file *one = *place(f, fh);
    uint64_t at = one ? one->at : NO_STREAM;
    pthread_mutex_unlock(&f->lock);
    return at;
}

void files_note(struct files *f, uint64_t fh)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one)
        one->unnoted = true;
    pthread_mutex_unlock(&f->lock);
}

void files_noted(struct files *f, uint64_t fh)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one)
        one->unnoted = false;
    pthread_mutex_unlock(&f->lock);
}

static bool is_cold(const struct file *one) { return one->cold >= COLD_AFTER && !one->tried; }

bool files_had(struct files *f, uint64_t fh, bool tried, bool had)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one) {
        one->cold = had ? 0 : one->cold + 1;
        one->tried = tried;
    }
    bool cold = one && is_cold(one);
    pthread_mutex_unlock(&f->lock);
    return cold;
}

/* Only of a descriptor that only reads: beside it nobody can have a write lease, which another open would wait for, and one more of
 * its kind does not look like a reader that was not there (`fs/writers.py`). */
static int open_past_cache(int fd)
{
#ifdef STATX_DIOALIGN
    struct statx st;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || ((flags & O_ACCMODE) != O_RDONLY && !MUTANT(44))
        || statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_DIOALIGN, &st))
        return NONE;
    /* Without: the file system knows no such reads, or they would go through the cache, of this file or all. */
    if (!(st.stx_mask & STATX_DIOALIGN) || !st.stx_dio_mem_align || !st.stx_dio_offset_align)
        return NONE;
    if (TM_PAGE % st.stx_dio_mem_align || TM_PAGE % st.stx_dio_offset_align)
        return NONE;
    int past = open_again(fd, O_RDONLY | O_DIRECT | O_NONBLOCK | (flags & O_NOATIME));
    return past < 0 ? NONE : past;
#else
    (void)fd;
    return NONE;
#endif
}

int files_past_cache(struct files *f, uint64_t fh)
{
    int past = NONE, fd = -1;
    pthread_mutex_lock(&f->lock);
    const struct file *known = *place(f, fh);
    if (known) {
        past = known->past;
        fd = known->fd;
        if (past == UNTRIED && f->npast >= f->most_past)
            past = NONE; /* until others are closed */
    }
    pthread_mutex_unlock(&f->lock);
    if (past != UNTRIED)
        return past;
    int own = open_past_cache(fd);
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one == known && one->past == UNTRIED) {
        one->past = past = own;
        f->npast += own >= 0;
        own = NONE;
    } else if (one == known) { /* another thread has been quicker */
        past = one->past;
    }
    pthread_mutex_unlock(&f->lock);
    if (own >= 0)
        close(own);
    return past;
}

static bool follows(const struct file *one, uint64_t offset)
{
    bool found = false;
    for (unsigned i = 0; i < ENDS; i++)
        found |= offset && one->ends[i] == offset;
    return found;
}

bool files_follows(struct files *f, uint64_t fh, uint64_t offset)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    bool found = one && follows(one, offset);
    pthread_mutex_unlock(&f->lock);
    return found;
}

/* The lock is held. */
static bool tell(struct file *one, struct target *out)
{
    struct gate *g = one->gate; /* stays as long as the file is in the table */
    pthread_mutex_lock(&g->lock);
    bool open = g->open;
    memcpy(out->oid, g->oid, TM_OID);
    out->size = g->size;
    out->turn = g->turn;
    out->takes = g->takes;
    pthread_mutex_unlock(&g->lock);
    out->fd = one->fd;
    out->local = one->local;
    out->unnoted = one->unnoted;
    return open;
}

/* Whether a READ is one of the stream's between its reader and `ahead`. Others read elsewhere in the file. The lock is held. */
static bool belongs(const struct file *one, uint64_t offset, uint64_t end, uint64_t ahead)
{
    uint64_t apart = (end - offset) * APART;
    return one->at != NO_STREAM && offset + apart >= one->at && offset <= ahead + apart;
}

/* Whether a READ is for Python, which reads ahead; else the reader of the stream has moved, if it was its. The lock is held. */
static bool reaches_mark(struct file *one, uint64_t offset, uint64_t end, bool moves)
{
    if (!belongs(one, offset, end, one->at))
        return false;
    if (moves && end > one->at)
        one->at = end;
    return end > one->mark;
}

bool files_find(struct files *f, uint64_t fh, uint64_t offset, uint64_t end, struct target *out)
{
    bool found = false;
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one && reaches_mark(one, offset, end, true))
        one->mark = UINT64_MAX;
    else if (one)
        found = tell(one, out);
    pthread_mutex_unlock(&f->lock);
    return found;
}

bool files_expect(struct files *f, uint64_t fh, uint64_t offset, uint64_t end, bool comes, struct target *out)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    bool found = one && !reaches_mark(one, offset, end, comes) && tell(one, out);
    pthread_mutex_unlock(&f->lock);
    return found;
}

bool files_show(struct files *f, uint64_t fh, const struct stat *st)
{
    struct stamps stamps;
    if (!stamps_of(st, &stamps))
        return false;
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    bool shows = one && gate_shows(one->gate, &stamps);
    pthread_mutex_unlock(&f->lock);
    return shows;
}

bool files_missed(struct files *f, uint64_t fh, uint64_t start, uint64_t end, bool noted, struct missed *out)
{
    bool may = false;
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one) {
        struct gate *g = one->gate;
        may = !belongs(one, start, end, one->end) && (noted || !follows(one, start));
        out->tries = one->cold < COLD_AFTER || one->cold % TRY_EVERY == 0;
        out->lacked = one->cold;
        if (!noted)
            one->ends[one->nends++ % ENDS] = end;
        out->cold = is_cold(one);
        may = tell(one, &out->target) && may && out->target.takes;
        out->gate = g;
        if (may)
            gate_hold(g);
    }
    pthread_mutex_unlock(&f->lock);
    return may;
}
