/* What host and agent say to each other over the serial port: frames of a header and up to CHUNK bytes.
 * tests/guest/channel.py is the other end. */
#ifndef PROTOCOL_H
#define PROTOCOL_H

#include <stdint.h>

enum { CHUNK = 32768 };

/* Little endian, as everything here is x86-64. */
struct frame {
    uint32_t length; /* bytes that follow */
    uint32_t id;     /* of the command, given by the host */
    uint32_t kind;   /* see below */
};

enum {
    /* host to agent */
    RUN = 1,       /* arguments, each ended by NUL */
    INPUT = 2,     /* bytes for standard input; none: its end. Acknowledged before the next may be sent */
    SIGNAL = 3,    /* one byte: the signal for the command's process group */
    PING = 4,      /* answered by PONG */
    /* agent to host */
    HELLO = 16,    /* the agent is there */
    OUTPUT = 17,   /* bytes of standard output */
    ERRORS = 18,   /* bytes of standard error */
    TAKEN = 19,    /* acknowledges INPUT */
    ENDED = 20,    /* four bytes: the status as waitpid gives it; all output came before */
    STARTED = 21,  /* four bytes: the process id */
    BUSY = 22,     /* no worker is free; the command was not started */
    PONG = 23,
};

/* What the nursery tells the agent: a worker waits (with its descriptors), or has ended. */
enum { READY = 1, GONE = 2 };
struct notice {
    int32_t kind;
    int32_t pid;
    int32_t status;
};

#endif
