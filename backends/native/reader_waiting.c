#include "reader_waiting.h"

#include <signal.h>
#include <stdlib.h>

enum { STACK_BYTES = 256 << 10 };

struct errand {
    struct errand *next;
    struct buffer *request, *data;
    size_t length;
    struct file *file; /* held */
};

int reader_thread(pthread_t *thread, void *(*run)(void *), void *arg)
{
    pthread_attr_t attr;
    sigset_t all, before;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(thread, &attr, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

static void run_errand(struct waiting *w, struct errand *e)
{
    const struct fuse_in_header *in = (const void *)e->request->data;
    struct answer answer;
    enum found found = hits_find(w->hits, (const void *)(in + 1), e->data->data, true, &answer);
    if (found != FOUND)
        passing_pass_held(w->passing, &e->request, e->length);
    else if (passing_end_held(w->passing, in->unique))
        reply_bytes(w->passing->device, in->unique, answer.bytes, answer.length);
    files_release(&w->hits->files, e->file);
    buffer_drop(e->request);
    buffer_drop(e->data);
    free(e);
}

static void *wait_for_lower(void *arg)
{
    struct waiting *w = arg;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        struct errand *e;
        while (!(e = w->first) && !w->ending)
            pthread_cond_wait(&w->called, &w->lock);
        if (!e)
            break;
        if (!(w->first = e->next))
            w->last = &w->first;
        w->idle--;
        pthread_mutex_unlock(&w->lock);
        run_errand(w, e);
        pthread_mutex_lock(&w->lock);
        w->idle++;
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

void waiting_init(struct waiting *w, struct hits *hits, struct passing *passing)
{
    *w = (struct waiting){.hits = hits, .passing = passing};
    w->last = &w->first;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->called, NULL);
}

void waiting_free(struct waiting *w)
{
    pthread_mutex_lock(&w->lock);
    w->ending = true;
    pthread_cond_broadcast(&w->called);
    pthread_mutex_unlock(&w->lock);
    for (unsigned i = 0; i < w->nthreads; i++)
        pthread_join(w->threads[i], NULL);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->called);
}

/* Whether a thread will come for one errand more. The lock is held. */
static bool has_thread(struct waiting *w)
{
    unsigned queued = 0;
    for (const struct errand *e = w->first; e; e = e->next)
        queued++;
    if (queued < w->idle)
        return true;
    if (w->nthreads == WAITERS_MOST || reader_thread(&w->threads[w->nthreads], wait_for_lower, w))
        return false;
    w->nthreads++;
    w->idle++;
    return true;
}

bool waiting_give(struct waiting *w, struct buffer **request, struct buffer **data, size_t length)
{
    const struct fuse_in_header *in = (const void *)(*request)->data;
    const struct fuse_read_in *read_in = (const void *)(in + 1);
    struct errand *e = malloc(sizeof *e);
    bool given = false;
    if (!e)
        return false;
    *e = (struct errand){.request = *request, .data = *data, .length = length};
    if (!(e->file = files_hold(&w->hits->files, read_in->fh))) {
        free(e);
        return false;
    }
    pthread_mutex_lock(&w->lock);
    if (has_thread(w) && passing_hold(w->passing, in)) {
        *w->last = e;
        w->last = &e->next;
        *request = *data = NULL;
        given = true;
    }
    pthread_mutex_unlock(&w->lock);
    if (given) {
        pthread_cond_signal(&w->called); /* not before: it would wait for the lock at once */
    } else {
        files_release(&w->hits->files, e->file);
        free(e);
    }
    return given;
}
