#include "reader_flights.h"

#include <stdlib.h>

int flights_init(struct flights *f)
{
    f->nbuckets = 256;
    f->count = 0;
    f->buckets = calloc(f->nbuckets, sizeof *f->buckets);
    return f->buckets ? 0 : -1;
}

void flights_free(struct flights *f)
{
    for (unsigned i = 0; f->buckets && i < f->nbuckets; i++)
        for (struct flight *one = f->buckets[i], *next; one; one = next) {
            next = one->next;
            if (one->payload)
                buffer_drop(one->payload);
            free(one);
        }
    free(f->buckets);
    f->buckets = NULL;
}

static struct flight **place(struct flights *f, uint64_t unique)
{
    /* The kernel counts requests in twos. */
    struct flight **p = &f->buckets[(unique >> 1) & (f->nbuckets - 1)];
    while (*p && (*p)->unique != unique)
        p = &(*p)->next;
    return p;
}

struct flight *flights_add(struct flights *f, uint64_t unique)
{
    struct flight *one = calloc(1, sizeof *one);
    if (!one)
        return NULL;
    one->unique = unique;
    struct flight **p = place(f, unique);
    one->next = *p; /* the end of a chain, as numbers are not used twice */
    *p = one;
    f->count++;
    return one;
}

struct flight *flights_find(struct flights *f, uint64_t unique) { return *place(f, unique); }

struct flight *flights_take(struct flights *f, uint64_t unique)
{
    struct flight **p = place(f, unique), *one = *p;
    if (one) {
        *p = one->next;
        f->count--;
    }
    return one;
}

void flights_each(struct flights *f, void (*visit)(struct flight *, void *), void *with)
{
    for (unsigned i = 0; i < f->nbuckets; i++)
        for (struct flight *one = f->buckets[i], *next; one; one = next) {
            next = one->next;
            visit(one, with);
        }
}
