#include "reader_nodes_inside.h"

#include "reader_listings.h"
#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FOREIGN_IDS (UINT64_C(1) << 62) /* node ids of files on other devices than the root's start here */

enum { FIRST_BUCKETS = 256 };

/* ---- Chains ------------------------------------------------------------------------------------------------ */

/* Inode numbers lie side by side. */
static size_t bucket_of(const struct nodes *n, uint64_t number)
{
    return (size_t)(number * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (n->nbuckets - 1);
}

static struct node **id_chain(const struct nodes *n, uint64_t nodeid) { return &n->by_id[bucket_of(n, nodeid)]; }

static struct node **key_chain(const struct nodes *n, uint64_t device, uint64_t number)
{
    return &n->by_key[bucket_of(n, number ^ device << 32)];
}

struct node *nodes_first_with(const struct nodes *n, uint64_t device, uint64_t number)
{
    return *key_chain(n, device, number);
}

struct node *nodes_find(const struct nodes *n, uint64_t nodeid)
{
    struct node *one = *id_chain(n, nodeid);
    while (one && one->nodeid != nodeid)
        one = one->next_by_id;
    return one;
}

struct node *nodes_with(const struct nodes *n, uint64_t device, uint64_t number)
{
    struct node *one = *key_chain(n, device, number);
    while (one && (one->number != number || one->device != device || one->beside))
        one = one->next_by_key;
    return one;
}

/* The lock is held in what follows. */

static void link_id(struct nodes *n, struct node *one)
{
    struct node **chain = id_chain(n, one->nodeid);
    one->next_by_id = *chain;
    *chain = one;
    one->by_id = true;
}

/* One that is `beside` stays so. */
static void link_key(struct nodes *n, struct node *one)
{
    struct node **chain = key_chain(n, one->device, one->number);
    one->next_by_key = *chain;
    *chain = one;
    one->by_key = !one->beside;
}

static void unlink_id(struct nodes *n, struct node *one)
{
    struct node **p = id_chain(n, one->nodeid);
    while (*p != one)
        p = &(*p)->next_by_id;
    *p = one->next_by_id;
    one->by_id = false;
}

static void unlink_key(struct nodes *n, struct node *one)
{
    struct node **p = key_chain(n, one->device, one->number);
    while (*p != one)
        p = &(*p)->next_by_key;
    *p = one->next_by_key;
    one->by_key = one->beside = false;
}

/* Twice as many buckets; no memory: chains get longer. A node has no key any more if its number was recycled. */
static void grow(struct nodes *n)
{
    struct nodes larger = {.nbuckets = n->nbuckets * 2};
    larger.by_id = calloc(larger.nbuckets, sizeof *larger.by_id);
    larger.by_key = calloc(larger.nbuckets, sizeof *larger.by_key);
    if (!larger.by_id || !larger.by_key) {
        free(larger.by_id);
        free(larger.by_key);
        return;
    }
    for (size_t i = 0; i < n->nbuckets; i++) {
        struct node *one, *next;
        for (one = n->by_id[i]; one; one = next) {
            next = one->next_by_id;
            link_id(&larger, one);
        }
        for (one = n->by_key[i]; one; one = next) {
            next = one->next_by_key;
            link_key(&larger, one);
        }
    }
    free(n->by_id);
    free(n->by_key);
    n->by_id = larger.by_id;
    n->by_key = larger.by_key;
    n->nbuckets = larger.nbuckets;
}

void nodes_append_open(struct nodes *n, struct node *one)
{
    one->newer = NULL;
    one->older = n->newest;
    *(n->newest ? &n->newest->newer : &n->oldest) = one;
    n->newest = one;
    n->nopen++;
}

void nodes_take_from_open(struct nodes *n, struct node *one)
{
    *(one->older ? &one->older->newer : &n->oldest) = one->newer;
    *(one->newer ? &one->newer->older : &n->newest) = one->older;
    one->older = one->newer = NULL;
    n->nopen--;
}

static bool is_root(const struct node *one) { return one->nodeid == ROOT_NODE; }

int nodes_take_descriptor(struct nodes *n, struct node *one)
{
    int fd = one->fd;
    if (fd >= 0 && one->by_id && !is_root(one))
        nodes_take_from_open(n, one);
    one->fd = -1;
    return fd;
}

/* ---- Life -------------------------------------------------------------------------------------------------- */

struct nodes *nodes_new(int root, bool numbers_tell, bool is_fuse)
{
    struct stat st;
    struct nodes *n = calloc(1, sizeof *n);
    struct node *one = calloc(1, sizeof *one);
    if (!n || !one || fstat(root, &st))
        goto failed;
    n->nbuckets = FIRST_BUCKETS;
    n->by_id = calloc(n->nbuckets, sizeof *n->by_id);
    n->by_key = calloc(n->nbuckets, sizeof *n->by_key);
    if (!n->by_id || !n->by_key)
        goto failed;
    atomic_init(&n->refs, 1);
    pthread_mutex_init(&n->lock, NULL);
    patience_init(&n->patience);
    n->root = root;
    n->reports = -1;
    n->device = st.st_dev;
    n->numbers_tell = numbers_tell;
    n->is_fuse = is_fuse;
    n->quota = SIZE_MAX;
    n->batch = 1;
    n->next_foreign = FOREIGN_IDS;
    *one = (struct node){.nodeid = ROOT_NODE, .device = st.st_dev, .number = st.st_ino, .kind = S_IFDIR,
                         .fd = root, .lookups = 1, .known_since = -1e300};
    link_id(n, one);
    link_key(n, one);
    n->count = 1;
    return n;
failed:
    if (n) {
        free(n->by_id);
        free(n->by_key);
    }
    free(n);
    free(one);
    return NULL;
}

struct patience *nodes_patience(struct nodes *n) { return &n->patience; }

void nodes_hold(struct nodes *n) { atomic_fetch_add(&n->refs, 1); }

void node_free(struct node *one)
{
    if (one->fd >= 0)
        close(one->fd);
    listed_drop(one->listed);
    free(one->handle);
    free(one);
}

void nodes_clear(struct nodes *n, bool closes, void (*release)(void *view))
{
    struct node *all = NULL;
    pthread_mutex_lock(&n->lock);
    for (size_t i = 0; i < n->nbuckets; i++) {
        for (struct node *one = n->by_id[i], *next; one; one = next) {
            next = one->next_by_id;
            one->older = one->newer = NULL;
            one->by_id = one->by_key = one->beside = false;
            one->next_by_id = all;
            all = one;
        }
        n->by_id[i] = n->by_key[i] = NULL;
    }
    n->oldest = n->newest = NULL;
    n->count = n->nopen = n->nbeside = 0;
    pthread_mutex_unlock(&n->lock);
    for (struct node *one = all, *next; one; one = next) {
        next = one->next_by_id;
        if (closes && one->fd >= 0)
            close(one->fd);
        one->fd = -1;
        if (one->view)
            release(one->view);
        else
            node_free(one);
    }
}

static void release_nothing(void *view) { (void)view; }

void nodes_drop(struct nodes *n)
{
    if (atomic_fetch_sub(&n->refs, 1) != 1)
        return;
    nodes_clear(n, false, release_nothing);
    pthread_mutex_destroy(&n->lock);
    free(n->by_id);
    free(n->by_key);
    free(n);
}

void nodes_bound(struct nodes *n, size_t quota, size_t batch, bool by_handle)
{
    n->quota = quota;
    n->batch = batch;
    n->by_handle = by_handle;
}

/* ---- Finding and counting --------------------------------------------------------------------------------- */

uint64_t nodes_device(const struct nodes *n) { return n->device; }

size_t nodes_count(const struct nodes *n) { return n->count; }

size_t nodes_open(const struct nodes *n) { return n->nopen; }

void nodes_counters(const struct nodes *n, uint64_t *next_foreign, uint32_t *last_generation)
{
    *next_foreign = n->next_foreign;
    *last_generation = n->last_generation;
}

void nodes_go_on(struct nodes *n, uint64_t next_foreign, uint32_t last_generation)
{
    n->next_foreign = next_foreign;
    n->last_generation = last_generation;
}

bool nodes_each(const struct nodes *n, bool (*visit)(struct node *, void *), void *with)
{
    for (struct node *one = n->oldest; one; one = one->newer)
        if (!visit(one, with))
            return false;
    for (size_t i = 0; i < n->nbuckets; i++)
        for (struct node *one = n->by_id[i]; one; one = one->next_by_id)
            if ((one->fd < 0 || is_root(one)) && !visit(one, with))
                return false;
    return true;
}

static void take_in(struct nodes *n, struct node *one)
{
    if (n->count >= n->nbuckets)
        grow(n);
    link_id(n, one);
    n->count++;
}

static struct node *make(struct nodes *n, const struct node *found, double now)
{
    struct node *one = malloc(sizeof *one);
    if (!one)
        return NULL;
    *one = (struct node){.nodeid = found->number, .device = found->device, .number = found->number,
                         .kind = found->kind, .fd = -1, .known_since = now};
    bool is_own = one->device == n->device && ROOT_NODE < one->nodeid && one->nodeid < FOREIGN_IDS;
    if (!is_own || nodes_find(n, one->nodeid))
        one->nodeid = n->next_foreign++;
    one->generation = n->last_generation = n->last_generation % UINT32_MAX + 1; /* the kernel keeps 32 bits, compares all */
    struct node *before = nodes_with(n, one->device, one->number);
    if (before && !nodes_numbers_tell(n, one->device))
        one->beside = (one->handle = nodes_ask_handle(n, one, found->fd)) != NULL;
    pthread_mutex_lock(&n->lock);
    if (before && !one->beside) /* whose number was recycled: its id answers ESTALE until it is forgotten */
        unlink_key(n, before);
    n->nbeside += one->beside;
    take_in(n, one);
    link_key(n, one);
    pthread_mutex_unlock(&n->lock);
    return one;
}

struct node *nodes_meet(struct nodes *n, const struct node *found, double now, bool opens)
{
    struct node *one = nodes_known(n, found);
    bool is_open = one && one->fd >= 0; /* so its number cannot have been recycled */
    if (one && !is_open) {
        struct handle *h = handle_at(found->fd, false);
        if (!handle_equals(one->handle, h))
            one = NULL;
        free(h);
    }
    if (is_open || (one && !opens)) {
        close(found->fd);
        return one;
    }
    if (!one && !(one = make(n, found, now)))
        close(found->fd);
    else
        nodes_keep(n, one, found->fd);
    return one;
}

struct node *nodes_restore(struct nodes *n, const struct node *saved)
{
    struct node *one = nodes_find(n, saved->nodeid);
    if (saved->by_id && one) { /* the root, which is there already */
        free(one->handle);
        one->handle = saved->handle;
        return one;
    }
    if (!(one = malloc(sizeof *one)))
        return NULL;
    *one = *saved;
    one->by_id = one->by_key = false;
    one->beside = saved->by_id && !saved->by_key && one->handle && !nodes_numbers_tell(n, one->device);
    pthread_mutex_lock(&n->lock);
    n->nbeside += one->beside;
    if (saved->by_id)
        take_in(n, one);
    if (saved->by_key || one->beside)
        link_key(n, one);
    if (saved->by_id && one->fd >= 0)
        nodes_append_open(n, one);
    pthread_mutex_unlock(&n->lock);
    return one;
}

bool nodes_take_back(struct nodes *n, uint64_t nodeid, uint64_t count)
{
    struct node *one = nodes_find(n, nodeid);
    if (!one || is_root(one))
        return true;
    bool last = one->lookups <= 0 || count >= (uint64_t)one->lookups;
    if (last && one->view)
        return false;
    one->lookups -= last ? one->lookups : (int64_t)count;
    if (last)
        nodes_remove(n, one);
    return true;
}

void nodes_remove(struct nodes *n, struct node *one)
{
    if (!one->by_id)
        return;
    pthread_mutex_lock(&n->lock);
    int fd = nodes_take_descriptor(n, one); /* waits for who uses it */
    unlink_id(n, one);
    n->nbeside -= one->beside;
    if (one->by_key || one->beside)
        unlink_key(n, one);
    n->count--;
    pthread_mutex_unlock(&n->lock);
    if (fd >= 0)
        close(fd);
    if (!one->view)
        node_free(one);
}

/* ---- What is told ------------------------------------------------------------------------------------------ */

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

void nodes_store_to(struct nodes *n, struct node *one, bool stored_to)
{
    pthread_mutex_lock(&n->lock);
    one->stored_to = stored_to;
    if (stored_to)
        one->until_ns = 0;
    pthread_mutex_unlock(&n->lock);
}

void nodes_reports(struct nodes *n, int fd)
{
    pthread_mutex_lock(&n->lock);
    n->reports = fd;
    pthread_mutex_unlock(&n->lock);
}

void nodes_catch_up(struct nodes *n, bool begins)
{
    pthread_mutex_lock(&n->lock);
    n->rounds += begins;
    n->catches_up = begins;
    pthread_mutex_unlock(&n->lock);
}

/* With the lock. */
static bool reports_wait(const struct nodes *n)
{
    struct pollfd reports = {.fd = n->reports, .events = POLLIN};
    return reports.fd >= 0 && poll(&reports, 1, 0) > 0;
}

static bool was_told(const struct node *one, int64_t mtime_ns) { return one->told && one->told_ns == mtime_ns; }

/* With the lock. */
static bool tells_another(const struct nodes *n, struct node *one, int64_t mtime_ns, bool hidden, bool *doubted)
{
    bool another = one->has_old == TELL_ALL || (one->has_old == TELL_KERNEL && hidden);
    if (!was_told(one, mtime_ns)) {
        one->told = true;
        one->told_ns = mtime_ns;
        one->told_late = n->catches_up || reports_wait(n);
        one->told_round = n->rounds;
    }
    *doubted = one->has_old != HAS_NONE;
    if (another) {
        one->has_old = HAS_NONE;
        one->spared = false;
    }
    return another;
}

/* With the lock. The last digit is enough for the kernel, which drops its pages if the time is not the one it knows. */
static void tell_time(const struct nodes *n, struct node *one, bool hidden, struct fuse_attr *attr, uint64_t *seconds, uint32_t *nanoseconds)
{
    bool doubted;
    if (tells_another(n, one, (int64_t)(attr->mtime * 1000000000 + attr->mtimensec), hidden, &doubted))
        attr->mtimensec ^= 1;
    if (doubted)
        *seconds = *nanoseconds = 0;
}

bool nodes_has_old(struct nodes *n, struct node *one, int64_t mtime_ns, enum old old)
{
    pthread_mutex_lock(&n->lock);
    bool told = was_told(one, mtime_ns);
    /* What waited then was read in that round, or is in the next one. */
    if (one->told_late && n->rounds - one->told_round <= 1 && old == TELL_ALL) {
        old = TELL_KERNEL;
        one->spared = told;
    }
    if (told && one->has_old < old)
        one->has_old = old;
    pthread_mutex_unlock(&n->lock);
    return told;
}

void nodes_still_has_old(struct nodes *n, struct node *one, int64_t mtime_ns)
{
    pthread_mutex_lock(&n->lock);
    if (was_told(one, mtime_ns) && one->has_old != TELL_ALL)
        one->has_old = one->spared ? TELL_ALL : TELL_KERNEL;
    pthread_mutex_unlock(&n->lock);
}

bool nodes_tells(struct nodes *n, struct node *one, int64_t mtime_ns, bool hidden, bool *doubted)
{
    pthread_mutex_lock(&n->lock);
    bool another = tells_another(n, one, mtime_ns, hidden, doubted);
    pthread_mutex_unlock(&n->lock);
    return another;
}

void nodes_tell_time(struct nodes *n, struct node *one, struct fuse_attr *attr, uint64_t *seconds, uint32_t *nanoseconds)
{
    pthread_mutex_lock(&n->lock);
    tell_time(n, one, true, attr, seconds, nanoseconds);
    pthread_mutex_unlock(&n->lock);
}

void nodes_told(struct nodes *n, uint64_t nodeid, int64_t until_ns)
{
    struct node *one = nodes_find(n, nodeid);
    if (one) {
        one->until_ns = until_ns;
        one->doubts = n->doubts;
    }
}

int64_t nodes_believed(struct nodes *n, uint64_t nodeid)
{
    const struct node *one = nodes_find(n, nodeid);
    return one && one->device == n->device && one->doubts == n->doubts ? one->until_ns : 0;
}

void nodes_doubt(struct nodes *n) { n->doubts++; }

int nodes_shown(const struct nodes *n, uint64_t nodeid)
{
    const struct node *one = nodes_find(n, nodeid);
    /* The root's id is not what stat shows of it. */
    return one && !one->stored_to && one->device == n->device && !is_root(one) ? one->fd : -1;
}

bool nodes_is_here(const struct nodes *n, uint64_t device, bool local) { return local && device == n->device; }

int nodes_borrow(struct nodes *n, uint64_t nodeid, bool local, bool *doubted)
{
    int fd = -1;
    pthread_mutex_lock(&n->lock);
    const struct node *one = nodes_find(n, nodeid);
    if (one && one->fd >= 0 && !nodes_is_here(n, one->device, local)) {
        fd = fcntl(one->fd, F_DUPFD_CLOEXEC, 0);
        *doubted = one->stored_to;
    }
    pthread_mutex_unlock(&n->lock);
    return fd;
}

static void put_status(const struct lifetimes *l, uint64_t nodeid, const struct stat *st, bool doubted, struct fuse_attr_out *out)
{
    *out = (struct fuse_attr_out){0};
    put_seconds(doubted ? 0 : attributes_seconds(l, st), &out->attr_valid, &out->attr_valid_nsec);
    put_attributes(st, nodeid == ROOT_NODE ? st->st_ino : nodeid, &out->attr);
}

void nodes_tell(struct nodes *n, uint64_t nodeid, const struct stat *st, bool doubted, struct fuse_attr_out *out)
{
    struct lifetimes lifetimes;
    nodes_lifetimes(n, &lifetimes);
    put_status(&lifetimes, nodeid, st, doubted, out);
}

bool nodes_attributes(struct nodes *n, uint64_t nodeid, bool hidden, struct fuse_attr_out *out)
{
    struct stat st;
    pthread_mutex_lock(&n->lock);
    int fd = nodes_shown(n, nodeid);
    bool known = fd >= 0 && !fstat(fd, &st);
    if (known) {
        put_status(&n->lifetimes, nodeid, &st, false, out);
        tell_time(n, nodes_find(n, nodeid), hidden, &out->attr, &out->attr_valid, &out->attr_valid_nsec);
    }
    pthread_mutex_unlock(&n->lock);
    return known;
}
