#include "reader_nodes.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct node {
    uint64_t nodeid;  /* 0: a free place */
    int64_t until_ns; /* what a listing has told is believed, monotonic */
    uint32_t doubts;  /* of the table, when it was told */
    int fd;           /* -1: none */
};

/* Open addressing; a place that becomes free is closed up, so that a search ends at the first free one. */
struct nodes {
    _Atomic uint32_t refs;
    pthread_mutex_t lock; /* of the rest */
    struct lifetimes lifetimes;
    struct node *places;
    size_t nplaces, count; /* a power of two, at most half of it used */
    uint32_t doubts;       /* how often all names were doubted */
    struct patience patience; /* needs no lock */
};

struct nodes *nodes_new(void)
{
    struct nodes *n = calloc(1, sizeof *n);
    if (!n)
        return NULL;
    n->nplaces = 256;
    if (!(n->places = calloc(n->nplaces, sizeof *n->places))) {
        free(n);
        return NULL;
    }
    atomic_init(&n->refs, 1);
    pthread_mutex_init(&n->lock, NULL);
    patience_init(&n->patience);
    return n;
}

struct patience *nodes_patience(struct nodes *n) { return &n->patience; }

void nodes_hold(struct nodes *n) { atomic_fetch_add(&n->refs, 1); }

void nodes_drop(struct nodes *n)
{
    if (atomic_fetch_sub(&n->refs, 1) != 1)
        return;
    pthread_mutex_destroy(&n->lock);
    free(n->places);
    free(n);
}

void nodes_believe(struct nodes *n, const struct lifetimes *l)
{
    pthread_mutex_lock(&n->lock);
    n->lifetimes = *l;
    pthread_mutex_unlock(&n->lock);
}

void nodes_lifetimes(struct nodes *n, struct lifetimes *out)
{
    pthread_mutex_lock(&n->lock);
    *out = n->lifetimes;
    pthread_mutex_unlock(&n->lock);
}

/* Node ids are inode numbers, which lie side by side. */
static size_t home_of(const struct nodes *n, uint64_t nodeid)
{
    return (size_t)(nodeid * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (n->nplaces - 1);
}

/* Where a node is, or would be. */
static size_t place(const struct nodes *n, uint64_t nodeid)
{
    size_t at = home_of(n, nodeid);
    while (n->places[at].nodeid && n->places[at].nodeid != nodeid)
        at = (at + 1) & (n->nplaces - 1);
    return at;
}

static bool grow(struct nodes *n)
{
    struct nodes larger = {.nplaces = n->nplaces * 2};
    if (!(larger.places = calloc(larger.nplaces, sizeof *larger.places)))
        return false;
    for (size_t i = 0; i < n->nplaces; i++)
        if (n->places[i].nodeid)
            larger.places[place(&larger, n->places[i].nodeid)] = n->places[i];
    free(n->places);
    n->places = larger.places;
    n->nplaces = larger.nplaces;
    return true;
}

/* The node's place, taken if it has none; NULL: no memory. */
static struct node *taken(struct nodes *n, uint64_t nodeid)
{
    struct node *one = &n->places[place(n, nodeid)];
    if (one->nodeid)
        return one;
    if (n->count * 2 >= n->nplaces) {
        if (!grow(n))
            return NULL;
        one = &n->places[place(n, nodeid)];
    }
    n->count++;
    *one = (struct node){.nodeid = nodeid, .fd = -1};
    return one;
}

void nodes_set(struct nodes *n, uint64_t nodeid, int fd)
{
    pthread_mutex_lock(&n->lock);
    struct node *one = taken(n, nodeid);
    if (one)
        one->fd = fd;
    pthread_mutex_unlock(&n->lock);
}

int nodes_descriptor(struct nodes *n, uint64_t nodeid)
{
    pthread_mutex_lock(&n->lock);
    const struct node *one = &n->places[place(n, nodeid)];
    int fd = nodeid && one->nodeid ? one->fd : -1;
    pthread_mutex_unlock(&n->lock);
    return fd;
}

void nodes_hide(struct nodes *n, uint64_t nodeid)
{
    pthread_mutex_lock(&n->lock);
    struct node *one = &n->places[place(n, nodeid)];
    if (one->nodeid)
        one->fd = -1;
    pthread_mutex_unlock(&n->lock);
}

void nodes_told(struct nodes *n, uint64_t nodeid, int64_t until_ns)
{
    pthread_mutex_lock(&n->lock);
    struct node *one = taken(n, nodeid);
    if (one) {
        one->until_ns = until_ns;
        one->doubts = n->doubts;
    }
    pthread_mutex_unlock(&n->lock);
}

int64_t nodes_believed(struct nodes *n, uint64_t nodeid)
{
    pthread_mutex_lock(&n->lock);
    const struct node *one = &n->places[place(n, nodeid)];
    int64_t until_ns = nodeid && one->nodeid && one->doubts == n->doubts ? one->until_ns : 0;
    pthread_mutex_unlock(&n->lock);
    return until_ns;
}

void nodes_doubt(struct nodes *n)
{
    pthread_mutex_lock(&n->lock);
    n->doubts++;
    pthread_mutex_unlock(&n->lock);
}

void nodes_remove(struct nodes *n, uint64_t nodeid)
{
    pthread_mutex_lock(&n->lock);
    size_t mask = n->nplaces - 1, hole = place(n, nodeid);
    if (n->places[hole].nodeid) {
        n->count--;
        n->places[hole].nodeid = 0;
        for (size_t at = (hole + 1) & mask; n->places[at].nodeid; at = (at + 1) & mask) {
            size_t home = home_of(n, n->places[at].nodeid);
            if (((at - home) & mask) >= ((at - hole) & mask)) { /* its search passes the hole */
                n->places[hole] = n->places[at];
                n->places[at].nodeid = 0;
                hole = at;
            }
        }
    }
    pthread_mutex_unlock(&n->lock);
}

void put_attributes(const struct stat *st, uint64_t nodeid, struct fuse_attr *out)
{
    *out = (struct fuse_attr){
        .ino = nodeid,
        .size = (uint64_t)st->st_size,
        .blocks = (uint64_t)st->st_blocks,
        .atime = (uint64_t)st->st_atim.tv_sec,
        .mtime = (uint64_t)st->st_mtim.tv_sec,
        .ctime = (uint64_t)st->st_ctim.tv_sec,
        .atimensec = (uint32_t)st->st_atim.tv_nsec,
        .mtimensec = (uint32_t)st->st_mtim.tv_nsec,
        .ctimensec = (uint32_t)st->st_ctim.tv_nsec,
        .mode = st->st_mode,
        .nlink = (uint32_t)st->st_nlink,
        .uid = st->st_uid,
        .gid = st->st_gid,
        .rdev = (uint32_t)st->st_rdev, /* the kernel's 32 bits are the lower ones of these */
        .blksize = (uint32_t)st->st_blksize,
    };
}

void put_seconds(double seconds, uint64_t *whole, uint32_t *nanoseconds)
{
    *whole = seconds >= 0x1p64 ? UINT64_MAX : seconds > 0 ? (uint64_t)seconds : 0;
    double rest = seconds - (double)*whole;
    *nanoseconds = rest <= 0 ? 0 : rest >= 0.999999999 ? 999999999 : (uint32_t)(rest * 1e9);
}

double attributes_seconds(const struct lifetimes *l, const struct stat *st)
{
    struct timespec now;
    if (st->st_dev != l->device || l->young == l->old)
        return l->young;
    clock_gettime(CLOCK_REALTIME, &now);
    double age = (double)(now.tv_sec - st->st_ctim.tv_sec) + (double)(now.tv_nsec - st->st_ctim.tv_nsec) / 1e9;
    return age > l->age ? l->old : l->young;
}

double put_looked_up(const struct lifetimes *l, const struct stat *st, struct fuse_entry_out *out)
{
    double name = st->st_dev == l->device ? l->name : l->name_elsewhere;
    double seconds = attributes_seconds(l, st);
    put_seconds(name, &out->entry_valid, &out->entry_valid_nsec);
    put_seconds(seconds, &out->attr_valid, &out->attr_valid_nsec);
    put_attributes(st, 0, &out->attr);
    return seconds;
}

bool nodes_attributes(struct nodes *n, uint64_t nodeid, struct fuse_attr_out *out)
{
    struct stat st;
    double seconds = 0;
    pthread_mutex_lock(&n->lock);
    const struct node *one = &n->places[place(n, nodeid)];
    bool known = nodeid && one->nodeid && one->fd >= 0 && !fstat(one->fd, &st);
    if (known)
        seconds = attributes_seconds(&n->lifetimes, &st);
    pthread_mutex_unlock(&n->lock);
    if (!known)
        return false;
    *out = (struct fuse_attr_out){0};
    put_seconds(seconds, &out->attr_valid, &out->attr_valid_nsec);
    put_attributes(&st, nodeid, &out->attr);
    return true;
}
