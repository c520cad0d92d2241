#include "reader_notify.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct note {
    struct note *next;
    size_t length;
    unsigned char message[];
};

int thread_start(pthread_t *thread, void *(*run)(void *), void *arg)
{
    pthread_attr_t attr;
    sigset_t all, before;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 256 << 10);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads that Python knows */
    int rc = pthread_create(thread, &attr, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

void notifier_init(struct notifier *n, int device)
{
    *n = (struct notifier){.device = device};
    n->last = &n->first;
    pthread_mutex_init(&n->lock, NULL);
    pthread_cond_init(&n->change, NULL);
}

static void *work(void *arg)
{
    struct notifier *n = arg;
    pthread_mutex_lock(&n->lock);
    for (;;) {
        struct note *note = n->first;
        if (!note && n->ending)
            break;
        if (!note) {
            pthread_cond_wait(&n->change, &n->lock);
            continue;
        }
        if (!(n->first = note->next))
            n->last = &n->first;
        n->busy = true;
        pthread_mutex_unlock(&n->lock);
        ssize_t ignored = write(n->device, note->message, note->length); /* ENOENT: it does not know that file */
        (void)ignored;
        free(note);
        pthread_mutex_lock(&n->lock);
        n->busy = false;
    }
    pthread_mutex_unlock(&n->lock);
    return NULL;
}

void notifier_send(struct notifier *n, const void *message, size_t length)
{
    struct note *note = malloc(sizeof *note + length);
    pthread_mutex_lock(&n->lock);
    if (!n->started)
        n->started = thread_start(&n->thread, work, n) == 0;
    if (note && n->started) {
        note->next = NULL;
        note->length = length;
        memcpy(note->message, message, length);
        *n->last = note;
        n->last = &note->next;
        note = NULL;
        pthread_cond_signal(&n->change);
    }
    pthread_mutex_unlock(&n->lock);
    if (note) { /* no thread: rather wait here than not tell */
        ssize_t ignored = write(n->device, message, length);
        (void)ignored;
        free(note);
    }
}

bool notifier_quiet(struct notifier *n)
{
    pthread_mutex_lock(&n->lock);
    bool quiet = !n->first && !n->busy;
    pthread_mutex_unlock(&n->lock);
    return quiet;
}

void notifier_free(struct notifier *n)
{
    pthread_mutex_lock(&n->lock);
    n->ending = true;
    pthread_cond_signal(&n->change);
    bool started = n->started;
    pthread_mutex_unlock(&n->lock);
    if (started)
        pthread_join(n->thread, NULL);
    for (struct note *note = n->first, *next; note; note = next) {
        next = note->next;
        free(note);
    }
    pthread_cond_destroy(&n->change);
    pthread_mutex_destroy(&n->lock);
}
