/* The reader's table of open files, and gates. Locks are held for a few instructions. */
#include "reader_files.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    ENDS = 2,       /* helpers may take two requests of a stream in the wrong order */
    COLD_AFTER = 4, /* misses that the kernel did not have, one after the other: asking costs 3 us each time */
    TRY_EVERY = 16, /* of those that follow */
};

struct file {
    struct file *next;
    uint64_t fh, mark;
    int fd;
    unsigned refs; /* of the table, and who holds it */
    bool local, unnoted, is_streamed;
    bool closes;   /* the descriptor is closed with the last reference */
    unsigned cold; /* misses that the kernel did not have, since the last that it had */
    unsigned nends;
    uint64_t ends[ENDS]; /* of the last misses */
    struct gate *gate;
};

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
    g->turn += !MUTANT(11);
    pthread_mutex_unlock(&g->lock);
    pthread_mutex_unlock(&g->put_lock);
}

void gate_overtake(struct gate *g)
{
    pthread_mutex_lock(&g->put_lock);
    pthread_mutex_lock(&g->lock);
    g->turn++;
    pthread_mutex_unlock(&g->lock);
    pthread_mutex_unlock(&g->put_lock);
}

uint32_t gate_top(struct gate *g)
{
    pthread_mutex_lock(&g->put_lock);
    uint32_t top = g->top;
    pthread_mutex_unlock(&g->put_lock);
    return top;
}

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
    gate_drop(one->gate);
    free(one);
}

void files_release(struct files *f, struct file *one)
{
    pthread_mutex_lock(&f->lock);
    bool last = !--one->refs;
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
    *one = (struct file){.fh = fh, .mark = UINT64_MAX, .fd = fd, .refs = 1, .local = local, .gate = gate};
    atomic_fetch_add(&gate->refs, 1);
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

void files_mark(struct files *f, uint64_t fh, uint64_t offset)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one && offset) {
        one->mark = offset;
        one->is_streamed |= offset != UINT64_MAX;
    } else if (one) {
        one->unnoted = true;
    }
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

void files_had(struct files *f, uint64_t fh, bool had)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one)
        one->cold = had ? 0 : one->cold + 1;
    pthread_mutex_unlock(&f->lock);
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

bool files_find(struct files *f, uint64_t fh, uint64_t end, struct target *out)
{
    bool found = false;
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one && end > one->mark)
        one->mark = UINT64_MAX;
    else if (one)
        found = tell(one, out);
    pthread_mutex_unlock(&f->lock);
    return found;
}

bool files_expect(struct files *f, uint64_t fh, uint64_t end, struct target *out)
{
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    bool found = one && end <= one->mark && tell(one, out);
    pthread_mutex_unlock(&f->lock);
    return found;
}

bool files_missed(struct files *f, uint64_t fh, uint64_t start, uint64_t end, bool noted, struct missed *out)
{
    bool may = false;
    pthread_mutex_lock(&f->lock);
    struct file *one = *place(f, fh);
    if (one) {
        struct gate *g = one->gate;
        may = !one->is_streamed && (noted || !follows(one, start));
        if (!noted)
            one->ends[one->nends++ % ENDS] = end;
        out->tries = one->cold < COLD_AFTER || one->cold % TRY_EVERY == 0;
        may = tell(one, &out->target) && may && out->target.takes;
        out->gate = g;
        if (may)
            atomic_fetch_add(&g->refs, 1);
    }
    pthread_mutex_unlock(&f->lock);
    return may;
}
