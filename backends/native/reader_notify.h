/* Notifications to the kernel that may wait for locks which it holds until one of its requests is answered: so they are
 * written by a thread of their own. */
#ifndef READER_NOTIFY_H
#define READER_NOTIFY_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

struct note;
struct notifier {
    int device;
    pthread_mutex_t lock;
    pthread_cond_t change;
    pthread_t thread;
    struct note *first, **last;
    bool started, busy, ending;
};

void notifier_init(struct notifier *n, int device);
void notifier_free(struct notifier *n); /* waits for the one that is being written */
void notifier_send(struct notifier *n, const void *message, size_t length);
bool notifier_quiet(struct notifier *n);
int thread_start(pthread_t *thread, void *(*run)(void *), void *arg); /* with a small stack and no signals */

#endif
