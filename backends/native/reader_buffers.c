/* Lists under one lock, which is held for a few instructions. */
#include "reader_buffers.h"

#include "tm.h"

#include <stdlib.h>
#include <sys/mman.h>

enum { KEPT = 4 }; /* A lone reader needs two, streams two more each. Locked memory: what is not needed is given back. */

struct buffers {
    pthread_mutex_t lock;
    size_t size;
    unsigned users; /* buffers that are held, and the reader */
    unsigned nfree;
    struct buffer *free, *sent;
    uint64_t numbers;
};

struct buffers *buffers_new(size_t size)
{
    struct buffers *all = calloc(1, sizeof *all);
    if (!all)
        return NULL;
    pthread_mutex_init(&all->lock, NULL);
    all->size = size;
    all->users = 1;
    return all;
}

static void unmap(struct buffer *b)
{
    munmap(b->data, b->size);
    free(b);
}

static void unmap_list(struct buffer *b)
{
    while (b) {
        struct buffer *next = b->next;
        unmap(b);
        b = next;
    }
}

/* Give up one use; the lock is held, and not any more afterwards. */
static void leave(struct buffers *all)
{
    bool last = --all->users == 0;
    pthread_mutex_unlock(&all->lock);
    if (last) {
        unmap_list(all->free);
        pthread_mutex_destroy(&all->lock);
        free(all);
    }
}

void buffers_free(struct buffers *all)
{
    struct buffer *b;
    if (!all)
        return;
    while ((b = all->sent)) { /* of replies that nobody will send */
        all->sent = b->next;
        buffer_drop(b);
    }
    pthread_mutex_lock(&all->lock);
    leave(all);
}

static struct buffer *map(struct buffers *all, size_t size)
{
    struct buffer *b = malloc(sizeof *b);
    void *data = b ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
    if (data == MAP_FAILED) {
        free(b);
        return NULL;
    }
    *b = (struct buffer){.home = all, .data = data, .size = size};
    return b;
}

struct buffer *buffer_take(struct buffers *all, size_t least)
{
    struct buffer *b = NULL;
    pthread_mutex_lock(&all->lock);
    if (least <= all->size && (b = all->free)) {
        all->free = b->next;
        all->nfree--;
    }
    all->users++;
    pthread_mutex_unlock(&all->lock);
    if (!b && !(b = map(all, least <= all->size ? all->size : (least + TM_PAGE - 1) / TM_PAGE * TM_PAGE))) {
        pthread_mutex_lock(&all->lock);
        leave(all);
        return NULL;
    }
    b->refs = 1;
    b->number = 0;
    return b;
}

void buffers_rest(struct buffers *all)
{
    pthread_mutex_lock(&all->lock);
    struct buffer *kept = MUTANT(94) ? NULL : all->free;
    if (kept) {
        all->free = NULL;
        all->nfree = 0;
    }
    pthread_mutex_unlock(&all->lock);
    unmap_list(kept);
}

void buffer_hold(struct buffer *b)
{
    pthread_mutex_lock(&b->home->lock);
    b->refs++;
    pthread_mutex_unlock(&b->home->lock);
}

void buffer_drop(struct buffer *b)
{
    struct buffers *all = b->home;
    pthread_mutex_lock(&all->lock);
    if (--b->refs) {
        pthread_mutex_unlock(&all->lock);
        return;
    }
    if (b->size == all->size && all->nfree < KEPT) {
        b->next = all->free;
        all->free = b;
        all->nfree++;
        b = NULL;
    }
    leave(all);
    if (b)
        unmap(b);
}

uint64_t buffers_send(struct buffers *all, struct buffer *b, size_t start, size_t length, int error)
{
    pthread_mutex_lock(&all->lock);
    uint64_t number = b->number ? 0 : ++all->numbers; /* once */
    if (number) {
        b->refs++;
        b->number = number;
        b->start = start;
        b->length = length;
        b->error = error;
        b->next = all->sent;
        all->sent = b;
    }
    pthread_mutex_unlock(&all->lock);
    return number;
}

struct buffer *buffers_sent(struct buffers *all, uint64_t number)
{
    pthread_mutex_lock(&all->lock);
    struct buffer **p = &all->sent, *b;
    while (*p && (*p)->number != number)
        p = &(*p)->next;
    if ((b = *p))
        *p = b->next;
    pthread_mutex_unlock(&all->lock);
    return b;
}
