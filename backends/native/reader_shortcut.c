#include "reader_shortcut.h"

#include "reader_names.h"
#include "reader_passing.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

int shortcut_init(struct shortcut *s)
{
    atomic_init(&s->open, false);
    pthread_mutex_init(&s->lock, NULL);
    s->first = NULL;
    s->last = &s->first;
    s->told = false;
    s->current = NULL;
    s->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return s->event < 0 ? -1 : 0;
}

void shortcut_free(struct shortcut *s)
{
    struct asked *a;
    while ((a = shortcut_take(s)))
        asked_free(a);
    asked_free(s->current);
    if (s->event >= 0)
        close(s->event);
    pthread_mutex_destroy(&s->lock);
}

void shortcut_open(struct shortcut *s) { atomic_store_explicit(&s->open, true, memory_order_release); }

/* What has its whole argument, and is answered without waiting for a worker thread; or is nothing that libfuse's bindings know of. */
static bool is_short(const struct fuse_in_header *in, size_t length)
{
    const uint8_t *body = (const uint8_t *)(in + 1);
    size_t argument = length - sizeof *in;
    struct fuse_open_in open;
    switch (in->opcode) {
    case FUSE_LOOKUP:
        return argument && !body[argument - 1];
    case FUSE_FORGET:
        return argument >= sizeof(struct fuse_forget_in);
    case FUSE_OPENDIR:
        return argument >= sizeof(struct fuse_open_in);
    case FUSE_READDIRPLUS:
        return argument >= sizeof(struct fuse_read_in);
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
        return argument >= sizeof(struct fuse_release_in);
    case FUSE_FALLOCATE:
        return argument >= sizeof(struct fuse_fallocate_in);
    case FUSE_LSEEK:
        return argument >= sizeof(struct fuse_lseek_in);
    case FUSE_OPEN:
        if (argument < sizeof open)
            return false;
        memcpy(&open, body, sizeof open);
        return !(open.flags & O_TRUNC);
    default:
        return false;
    }
}

bool shortcut_takes(struct shortcut *s, const struct fuse_in_header *in, size_t length)
{
    return atomic_load_explicit(&s->open, memory_order_acquire) && is_short(in, length);
}

/* Make the event readable, or not any more. The lock is held. */
static void tell(struct shortcut *s, bool readable)
{
    uint64_t count = 1;
    if (s->told == readable)
        return;
    ssize_t ignored = readable ? write(s->event, &count, sizeof count) : read(s->event, &count, sizeof count);
    (void)ignored;
    s->told = readable;
}

static void append(struct shortcut *s, struct asked *a, bool told)
{
    a->next = NULL;
    pthread_mutex_lock(&s->lock);
    *s->last = a;
    s->last = &a->next;
    if (told)
        tell(s, true);
    pthread_mutex_unlock(&s->lock);
}

struct asked *asked_new(const struct fuse_in_header *in, size_t length, bool tried)
{
    struct asked *a = malloc(sizeof *a + length + 1);
    if (!a)
        return NULL;
    *a = (struct asked){.length = length, .tried = tried, .fd = -1};
    memcpy(a->bytes, in, length);
    a->bytes[length] = 0;
    return a;
}

void asked_free(struct asked *a)
{
    if (!a)
        return;
    if (a->fd >= 0)
        close(a->fd);
    names_free(a->content);
    free(a);
}

bool shortcut_put(struct shortcut *s, struct passing *passing, const struct fuse_in_header *in, size_t length,
                  struct entry *entry, bool leads)
{
    if (!shortcut_takes(s, in, length))
        return false;
    struct asked *a = asked_new(in, length, leads);
    if (!a)
        return false;
    if (passing && in->opcode != FUSE_FORGET && !passing_hold(passing, in, length, entry)) {
        asked_free(a);
        return false;
    }
    append(s, a, !leads);
    return true;
}

void shortcut_again(struct shortcut *s, struct asked *a)
{
    a->fetched++;
    append(s, a, true);
}

struct asked *shortcut_first(struct shortcut *s)
{
    pthread_mutex_lock(&s->lock);
    struct asked *a = s->first;
    pthread_mutex_unlock(&s->lock);
    return a;
}

struct asked *shortcut_take(struct shortcut *s)
{
    pthread_mutex_lock(&s->lock);
    struct asked *a = s->first;
    if (a && !(s->first = a->next))
        s->last = &s->first;
    if (!s->first)
        tell(s, false);
    pthread_mutex_unlock(&s->lock);
    return a;
}

bool shortcut_quiet(struct shortcut *s)
{
    pthread_mutex_lock(&s->lock);
    bool quiet = !s->first;
    pthread_mutex_unlock(&s->lock);
    return quiet;
}
