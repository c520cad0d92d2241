#include "reader_window.h"

#include "reader_waiting.h"

enum { WHOLE_NS = 50000 }; /* to wait for a piece: some six times what one takes */

/* Claim up to `most` pages and fetch them; false: there are none. */
static bool fetch_some(struct window *w, uint32_t most)
{
    uint64_t claims = atomic_load(&w->claims);
    uint32_t from, n;
    do {
        from = (uint32_t)claims;
        n = (uint32_t)(claims >> 32) - from;
        n = n < most ? n : most;
        if (!n)
            return false;
    } while (!atomic_compare_exchange_weak(&w->claims, &claims, claims + n));
    KP(98);
    if (!hits_fetch(w->hits, &w->target, w->first + from, w->data + (size_t)from * TM_PAGE, n))
        atomic_store(&w->failed, true);
    atomic_fetch_sub(&w->left, n);
    return true;
}

static void open_for_claims(struct window *w)
{
    if (!w->opened)
        atomic_store(&w->claims, (uint64_t)w->npages << 32);
    w->opened = true;
}

static void *fetch_beside(void *arg)
{
    struct window *w = arg;
    while (!atomic_load(&w->ending)) {
        while (atomic_load(&w->lent) && fetch_some(w, WINDOW_PIECE))
            ;
        while (sem_wait(&w->called))
            ; /* a signal */
    }
    return NULL;
}

void window_init(struct window *w, struct hits *hits)
{
    w->hits = hits;
    sem_init(&w->called, 0, 0);
}

void window_free(struct window *w)
{
    window_take_back(w);
    atomic_store(&w->ending, true);
    if (w->has_second) {
        sem_post(&w->called);
        pthread_join(w->thread, NULL);
    }
    sem_destroy(&w->called);
}

bool window_end(struct window *w)
{
    window_take_back(w);
    uint64_t claims = atomic_exchange(&w->claims, 0);
    uint32_t unclaimed = w->opened ? (uint32_t)(claims >> 32) - (uint32_t)claims : w->npages;
    w->opened = false;
    w->npages = 0;
    return atomic_fetch_sub(&w->left, unclaimed) == unclaimed || MUTANT(46);
}

void window_begin(struct window *w, const struct target *t, uint32_t first, uint32_t npages, uint8_t *data)
{
    w->target = *t;
    w->first = first;
    w->npages = npages;
    w->data = data;
    atomic_store(&w->failed, false);
    atomic_store(&w->left, npages);
}

void window_lend(struct window *w)
{
    if (!w->has_second && !w->no_second) {
        w->has_second = reader_thread(&w->thread, fetch_beside, w) == 0;
        w->no_second = !w->has_second;
    }
    if (!w->has_second)
        return;
    open_for_claims(w);
    atomic_store(&w->lent, true);
    sem_post(&w->called);
}

void window_take_back(struct window *w) { atomic_store(&w->lent, false); }

void window_fetch(struct window *w)
{
    uint32_t piece = w->opened ? WINDOW_PIECE : w->npages;
    window_take_back(w);
    open_for_claims(w);
    while (fetch_some(w, piece))
        ;
}

bool window_whole(struct window *w)
{
    uint64_t begun_ns = timing_now();
    while (atomic_load(&w->left) && !MUTANT(47))
        if (timing_now() - begun_ns > WHOLE_NS)
            return false;
    return !atomic_load(&w->failed);
}
