#include "reader_passing.h"

#include "reader_clock.h"
#include "reader_interrupt.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    MOST_LISTING = 64 << 10,  /* bytes of a reply to READDIR */
    MOST_LINK = 4 << 10,      /* of a reply to READLINK */
    MOST_FORGOTTEN = 4000,    /* nodes in one message */
    READS_BYTES = 32 << 20,   /* of READs under way: each holds a buffer while it is served */
    WRITES_BYTES = 64 << 20,  /* of WRITEs under way */
    REPLIES_SHARE = 2,        /* of the socket's buffer: what a message takes of it is estimated */
    RECHECK_MS = 200,
};

struct message {
    struct message *next;
    uint64_t unique;
    size_t length;
    uint8_t bytes[];
};

/* What a WRITE is for libfuse. */
struct write_message {
    struct fuse_in_header in;
    struct fuse_write_in write;
    uint64_t number;
};
_Static_assert(sizeof(struct write_message) == 40 + 40 + 8, "no padding");

/* ---- Life ------------------------------------------------------------------------------------------------- */

static void queue_init(struct queue *q)
{
    q->first = NULL;
    q->last = &q->first;
}

static void queue_free(struct queue *q)
{
    for (struct message *m = q->first, *next; m; m = next) {
        next = m->next;
        free(m);
    }
    queue_init(q);
}

int passing_init(struct passing *p, int device, int ours, int theirs, struct buffers *buffers)
{
    int bytes;
    socklen_t length = sizeof bytes;
    *p = (struct passing){.device = device, .ours = ours, .buffers = buffers};
    pthread_mutex_init(&p->lock, NULL);
    amendments_init(&p->amendments);
    queue_init(&p->unsent);
    queue_init(&p->later);
    if (getsockopt(theirs, SOL_SOCKET, SO_SNDBUF, &bytes, &length))
        return -1;
    p->room = (uint64_t)bytes / REPLIES_SHARE;
    p->reply = malloc(MOST_MESSAGE);
    return flights_init(&p->flights) || !p->reply ? -1 : 0;
}

void passing_free(struct passing *p)
{
    queue_free(&p->unsent);
    queue_free(&p->later);
    flights_free(&p->flights);
    amendments_free(&p->amendments);
    pthread_mutex_destroy(&p->lock);
    free(p->reply);
}

/* ---- To libfuse ------------------------------------------------------------------------------------------- */

static bool is_answered(uint32_t opcode)
{
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET;
}

/* Of the socket, for a reply of at most so many bytes: a message is a header, and memory in powers of two. */
uint32_t room_for(size_t bytes) { return bytes <= MOST_OTHER ? 1024 : (uint32_t)(2048 + 2 * bytes); }

static uint32_t room_of(uint32_t opcode, const uint8_t *body)
{
    struct fuse_getxattr_in xattr;
    struct fuse_read_in listing;
    switch (opcode) {
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
        memcpy(&listing, body, sizeof listing);
        return room_for(listing.size < MOST_LISTING ? listing.size : MOST_LISTING);
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
        memcpy(&xattr, body, sizeof xattr);
        return room_for(xattr.size < MOST_LISTING ? xattr.size : MOST_LISTING);
    case FUSE_READLINK:
        return room_for(MOST_LINK);
    default:
        return room_for(MOST_OTHER);
    }
}

/* The lock is held from here on, where there is one. */

static enum passed keep_in(struct queue *q, uint64_t unique, const void *bytes, size_t length)
{
    struct message *m = malloc(sizeof *m + length);
    if (!m)
        return PASSED_NOT;
    m->next = NULL;
    m->unique = unique;
    m->length = length;
    memcpy(m->bytes, bytes, length);
    *q->last = m;
    q->last = &m->next;
    return PASSED_LATER;
}

static void look_whether_full(struct passing *p)
{
    atomic_store(&p->full, p->unsent.first || p->writing >= WRITES_BYTES);
}

/* Give a message to libfuse if the socket has room for it and its reply; `f` NULL: there is none. */
static bool give(struct passing *p, struct flight *f, const void *bytes, size_t length)
{
    ssize_t n;
    if (f && p->room_used && p->room_used + f->room > p->room)
        return false;
    do
        n = send(p->ours, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n < 0 && errno != EPIPE) /* at its end nobody waits for it */
        return false;
    if (f) {
        p->room_used += f->room;
        f->given = true;
        atomic_fetch_add(&p->expected, 1);
    }
    atomic_fetch_add_explicit(&p->passed, 1, memory_order_relaxed);
    return true;
}

static bool may_read(const struct passing *p, const struct flight *f)
{
    return !p->reading || p->reading + f->size <= READS_BYTES;
}

/* Pass a message on now, or when there is room. */
enum passed passing_give(struct passing *p, struct flight *f, const void *bytes, size_t length)
{
    uint64_t unique = f ? f->unique : 0;
    bool reads = f && f->opcode == FUSE_READ;
    if (reads && (p->later.first || !may_read(p, f)))
        return keep_in(&p->later, unique, bytes, length);
    enum passed result = PASSED;
    if (p->unsent.first || !give(p, f, bytes, length))
        result = keep_in(&p->unsent, unique, bytes, length);
    if (reads && result != PASSED_NOT)
        p->reading += f->size;
    look_whether_full(p);
    return result;
}

void passing_give_kept(struct passing *p)
{
    struct message *m;
    while ((m = p->unsent.first) && give(p, flights_find(&p->flights, m->unique), m->bytes, m->length)) {
        if (!(p->unsent.first = m->next))
            p->unsent.last = &p->unsent.first;
        free(m);
    }
    while (!p->unsent.first && (m = p->later.first)) {
        struct flight *f = flights_find(&p->flights, m->unique);
        if (!may_read(p, f) || !give(p, f, m->bytes, m->length))
            break;
        p->reading += f->size;
        if (!(p->later.first = m->next))
            p->later.last = &p->later.first;
        free(m);
    }
    look_whether_full(p);
}

static void forget_split(struct passing *p, const struct buffer *request, size_t length)
{
    struct {
        struct fuse_in_header in;
        struct fuse_batch_forget_in batch;
        struct fuse_forget_one one[MOST_FORGOTTEN];
    } *part = malloc(sizeof *part);
    size_t head = sizeof part->in + sizeof part->batch, one = sizeof part->one[0];
    if (!part)
        return; /* nodes that are remembered for longer */
    memcpy(part, request->data, head);
    size_t left = (length - head) / one;
    left = left < part->batch.count ? left : part->batch.count;
    for (const uint8_t *from = request->data + head; left;) {
        size_t n = left < MOST_FORGOTTEN ? left : MOST_FORGOTTEN;
        memcpy(part->one, from, n * one);
        part->batch.count = (uint32_t)n;
        part->in.len = (uint32_t)(head + n * one);
        (void)passing_give(p, NULL, part, part->in.len);
        from += n * one;
        left -= n;
    }
    free(part);
}

/* Have the flight of a WRITE keep its buffer; -1: no memory for another. */
static int keep_payload(struct passing *p, struct flight *f, struct buffer **request, struct write_message *out)
{
    struct buffer *other = buffer_take(p->buffers, 0);
    if (!other)
        return -1;
    memcpy(out, (*request)->data, sizeof out->in + sizeof out->write);
    f->payload = *request;
    f->size = out->write.size;
    p->writing += f->size;
    *request = other;
    out->in.len = sizeof *out;
    out->write.size = sizeof out->number;
    out->number = f->unique;
    look_whether_full(p);
    return 0;
}

void passing_forsake(struct passing *p, struct flight *f)
{
    (void)flights_take(&p->flights, f->unique);
    if (f->payload) {
        p->writing -= f->size;
        buffer_drop(f->payload);
    }
    free(f);
}

/* ---- Interrupts ------------------------------------------------------------------------------------------- */

static bool take_out(struct queue *q, uint64_t unique)
{
    struct message **p = &q->first, *m;
    while (*p && (*p)->unique != unique)
        p = &(*p)->next;
    if (!(m = *p))
        return false;
    if (!(*p = m->next))
        q->last = p;
    free(m);
    return true;
}

/* Answer a request whose program is going to die. */
static void give_up(struct passing *p, struct flight *f)
{
    if (f->given_up || !f->may_be_given_up || !is_dying(f->thread))
        return;
    atomic_fetch_sub(&p->interrupted, 1);
    atomic_fetch_add_explicit(&p->given_up, 1, memory_order_relaxed);
    reply_error(p, f->entry, f->unique, -EINTR);
    f->entry = NULL; /* which brings others now */
    f->given_up = true;
    if (f->given || f->held) {
        p->abandoned++;
        return;
    }
    if (take_out(&p->unsent, f->unique) && f->opcode == FUSE_READ)
        p->reading -= f->size;
    (void)take_out(&p->later, f->unique);
    passing_forsake(p, f);
    passing_give_kept(p); /* what it was in the way of */
}

static void note_interrupt(struct passing *p, struct flight *f)
{
    if (f->interrupted || !f->may_be_given_up)
        return;
    f->interrupted = true;
    atomic_fetch_add(&p->interrupted, 1);
    give_up(p, f);
}

/* The request may be in the hands of another thread still, which is about to pass it on. */
static bool was_early(struct passing *p, uint64_t unique)
{
    for (unsigned i = 0; p->early_kept && i < EARLY; i++) /* eight lines of a cache that may be cold: mostly there is none */
        if (p->early[i] == unique) {
            p->early[i] = 0;
            p->early_kept--;
            return true;
        }
    return false;
}

static void note_early(struct passing *p, uint64_t unique)
{
    uint64_t *place = &p->early[p->nearly++ % EARLY];
    p->early_kept += !*place;
    *place = unique;
}

static void interrupt(struct passing *p, const struct fuse_in_header *in)
{
    struct fuse_interrupt_in which;
    memcpy(&which, in + 1, sizeof which);
    struct flight *f = flights_find(&p->flights, which.unique);
    if (f)
        note_interrupt(p, f);
    else
        note_early(p, which.unique);
}

static void look_again(struct flight *f, void *with)
{
    if (f->interrupted)
        give_up(with, f);
}

void passing_recheck(struct passing *p)
{
    if (!passing_interrupted(p))
        return;
    int64_t now = now_ms();
    pthread_mutex_lock(&p->lock);
    if (now - p->checked_ms >= RECHECK_MS) {
        p->checked_ms = now;
        flights_each(&p->flights, look_again, p);
    }
    pthread_mutex_unlock(&p->lock);
}

bool passing_interrupted(const struct passing *p) { return atomic_load(&p->interrupted); }

/* ---- Requests --------------------------------------------------------------------------------------------- */

static bool opens_to_read(const uint8_t *body)
{
    struct fuse_open_in open;
    memcpy(&open, body, sizeof open);
    return (open.flags & O_ACCMODE) == O_RDONLY;
}

/* Only what reads past the kernel's cache says whose locks it minds. */
static void note_read(struct flight *f, const struct fuse_read_in *in)
{
    f->size = in->size;
    f->fills = !(in->read_flags & FUSE_READ_LOCKOWNER);
}

static void note_listing(struct flight *f, struct fuse_read_in *in)
{
    if (in->size > MOST_LISTING)
        in->size = MOST_LISTING;
    f->size = in->size;
    f->offset = in->offset;
    if (f->opcode == FUSE_READDIRPLUS)
        in->offset = f->unique;
}

static enum passed pass_request(struct passing *p, struct buffer **request, size_t length, struct entry *entry)
{
    struct fuse_in_header *in = (void *)(*request)->data;
    uint8_t *body = (*request)->data + sizeof *in;
    struct fuse_read_in *sized = (void *)body; /* READ, READDIR and READDIRPLUS */
    struct fuse_write_in *writing = (void *)body;
    struct write_message by_number;
    struct flight *f = flights_add(&p->flights, in->unique);
    enum passed result = PASSED_NOT;
    if (!f)
        return result;
    f->entry = entry;
    f->opcode = in->opcode;
    f->room = room_of(in->opcode, body);
    f->thread = in->pid;
    f->changes = p->changes;
    f->may_be_given_up = may_be_given_up(in, length);
    if (in->opcode == FUSE_WRITE) {
        if (length >= sizeof *in + sizeof *writing && writing->size <= length - sizeof *in - sizeof *writing
            && !keep_payload(p, f, request, &by_number))
            result = passing_give(p, f, &by_number, sizeof by_number);
    } else if (length <= MOST_MESSAGE - sizeof *in) {
        if (in->opcode == FUSE_READ)
            note_read(f, sized);
        else if (in->opcode == FUSE_OPEN)
            f->reads_only = opens_to_read(body);
        else if (in->opcode == FUSE_READDIR || in->opcode == FUSE_READDIRPLUS)
            note_listing(f, sized);
        result = passing_give(p, f, in, length);
    }
    if (result == PASSED_NOT)
        passing_forsake(p, f);
    else if (was_early(p, f->unique))
        note_interrupt(p, f);
    return result;
}

enum passed pass_on(struct passing *p, struct buffer **request, size_t length, struct entry *entry)
{
    const struct fuse_in_header *in = (const void *)(*request)->data;
    uint64_t unique = in->unique;
    enum passed result = PASSED_NOT;
    bool answered = is_answered(in->opcode);
    pthread_mutex_lock(&p->lock);
    if (in->opcode == FUSE_INTERRUPT)
        answered = (interrupt(p, in), false);
    else if (answered)
        result = pass_request(p, request, length, entry);
    else if (length > MOST_MESSAGE)
        forget_split(p, *request, length);
    else
        result = passing_give(p, NULL, in, length);
    pthread_mutex_unlock(&p->lock);
    if (answered && result == PASSED_NOT)
        reply_error(p, entry, unique, -EIO); /* nobody else will */
    return result;
}

/* ---- Requests that are waited for here --------------------------------------------------------------------- */

bool passing_hold(struct passing *p, const struct fuse_in_header *in, size_t length, struct entry *entry)
{
    struct fuse_read_in listing;
    bool closes = in->opcode == FUSE_RELEASE || in->opcode == FUSE_RELEASEDIR;
    pthread_mutex_lock(&p->lock);
    /* What was given up may use the handle still: it must not be overtaken. */
    struct flight *f = closes && p->abandoned ? NULL : flights_add(&p->flights, in->unique);
    if (f) {
        f->entry = entry;
        f->opcode = in->opcode;
        f->thread = in->pid;
        f->held = true;
        f->changes = p->changes;
        f->may_be_given_up = may_be_given_up(in, length);
        if (in->opcode == FUSE_OPEN) {
            f->reads_only = opens_to_read((const uint8_t *)(in + 1));
        } else if (in->opcode == FUSE_READDIRPLUS) {
            memcpy(&listing, in + 1, sizeof listing);
            note_listing(f, &listing);
        }
        if (was_early(p, f->unique))
            note_interrupt(p, f);
    }
    pthread_mutex_unlock(&p->lock);
    return f != NULL;
}

/* Take one that is held out; false: it was given up. `interrupted`: by a signal that was not fatal yet. */
static bool take_held(struct passing *p, uint64_t unique, bool *interrupted, struct entry **entry)
{
    struct flight *f = flights_take(&p->flights, unique);
    bool given_up = f->given_up;
    p->abandoned -= given_up;
    *entry = f->entry;
    *interrupted = f->interrupted && !given_up;
    if (*interrupted)
        atomic_fetch_sub(&p->interrupted, 1);
    free(f);
    return !given_up;
}

bool passing_may_close(struct passing *p)
{
    pthread_mutex_lock(&p->lock);
    bool may = !p->abandoned;
    pthread_mutex_unlock(&p->lock);
    return may;
}

bool passing_end_held(struct passing *p, uint64_t unique, struct entry **entry)
{
    bool interrupted;
    pthread_mutex_lock(&p->lock);
    bool wanted = take_held(p, unique, &interrupted, entry);
    pthread_mutex_unlock(&p->lock);
    return wanted;
}

uint64_t passing_changes(const struct passing *p) { return atomic_load(&p->changes); }

static void doubt_if_overtaken(const struct passing *p, uint64_t changes, struct fuse_attr_out *out)
{
    if (changes != passing_changes(p))
        out->attr_valid = out->attr_valid_nsec = 0;
}

void passing_tell_since(struct passing *p, uint64_t unique, uint64_t changes, struct fuse_attr_out *out)
{
    pthread_mutex_lock(&p->lock);
    doubt_if_overtaken(p, changes, out);
    reply_bytes(p, NULL, unique, (const uint8_t *)out, sizeof *out);
    pthread_mutex_unlock(&p->lock);
}

void passing_tell(struct passing *p, uint64_t unique, int error, struct fuse_attr_out *out)
{
    struct entry *entry;
    bool interrupted;
    pthread_mutex_lock(&p->lock);
    doubt_if_overtaken(p, flights_find(&p->flights, unique)->changes, out);
    if (!take_held(p, unique, &interrupted, &entry))
        ; /* nobody hears it */
    else if (error) /* with the lock: before the reply to a change that comes now */
        reply_error(p, entry, unique, -(error < MOST_ERROR ? error : EIO));
    else
        reply_bytes(p, entry, unique, (const uint8_t *)out, sizeof *out);
    pthread_mutex_unlock(&p->lock);
}

bool passing_wants_held(struct passing *p, uint64_t unique)
{
    struct entry *entry;
    bool interrupted;
    pthread_mutex_lock(&p->lock);
    const struct flight *f = flights_find(&p->flights, unique);
    bool wanted = !f || !f->given_up || take_held(p, unique, &interrupted, &entry);
    pthread_mutex_unlock(&p->lock);
    return wanted;
}

void passing_pass_held(struct passing *p, struct buffer **request, size_t length)
{
    const struct fuse_in_header *in = (const void *)(*request)->data;
    struct entry *entry;
    bool interrupted;
    pthread_mutex_lock(&p->lock);
    if (take_held(p, in->unique, &interrupted, &entry)) {
        if (interrupted)
            note_early(p, in->unique);
        if (pass_request(p, request, length, entry) == PASSED_NOT)
            reply_error(p, entry, in->unique, -EIO);
    }
    pthread_mutex_unlock(&p->lock);
}

/* ---- Questions -------------------------------------------------------------------------------------------- */

bool passing_full(const struct passing *p) { return atomic_load_explicit(&p->full, memory_order_relaxed); }

bool passing_expects(const struct passing *p) { return atomic_load_explicit(&p->expected, memory_order_relaxed); }

bool passing_quiet(struct passing *p)
{
    pthread_mutex_lock(&p->lock);
    bool quiet = !p->flights.count && !p->unsent.first;
    pthread_mutex_unlock(&p->lock);
    return quiet;
}

bool passing_asks_for(struct passing *p, uint64_t unique, uint64_t *offset, uint32_t *size)
{
    pthread_mutex_lock(&p->lock);
    const struct flight *f = flights_find(&p->flights, unique);
    bool found = f && f->opcode == FUSE_READDIRPLUS && !f->payload;
    if (found) {
        *offset = f->offset;
        *size = f->size;
    }
    pthread_mutex_unlock(&p->lock);
    return found;
}

bool passing_list(struct passing *p, uint64_t unique, struct buffer *b, size_t length)
{
    pthread_mutex_lock(&p->lock);
    struct flight *f = flights_find(&p->flights, unique);
    bool found = f && f->opcode == FUSE_READDIRPLUS && !f->payload && length <= f->size;
    if (found) {
        buffer_hold(b);
        f->payload = b;
        f->length = length;
    }
    pthread_mutex_unlock(&p->lock);
    return found;
}

struct buffer *passing_payload(struct passing *p, uint64_t unique, size_t *start, size_t *length)
{
    struct buffer *b = NULL;
    pthread_mutex_lock(&p->lock);
    struct flight *f = flights_find(&p->flights, unique);
    if (f && f->opcode == FUSE_WRITE && (b = f->payload)) {
        buffer_hold(b);
        *start = sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in);
        *length = f->size;
    }
    pthread_mutex_unlock(&p->lock);
    return b;
}
