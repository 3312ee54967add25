// The CPU's side of a device that runs by itself: it posts which experts of a token are left to the CPU, and waits for
// their sum.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ffn.h"
#include "futex.h"

namespace moert {

// Where messages and answers are, in memory that the device reads and writes too. There is one at a time: who posts the
// next one has the answer to the one before, or does not want it any more.
struct Letters {
    FutexWord* posted = nullptr;      // the number of the latest message, written last
    FutexWord* answered = nullptr;    // the number of the message that `sums` answer, written last; or kClosed
    FutexWord* failed = nullptr;      // 0, or kNotComputed here; the device writes other numbers
    const int32_t* header = nullptr;  // the layer, and how many experts
    const int32_t* ids = nullptr;     // of those, ascending
    const float* weights = nullptr;   // of those
    const uint8_t* hidden = nullptr;  // [hidden] of the layer's type
    float* sums = nullptr;            // [hidden]
    int64_t most = 0;                 // experts
};

constexpr uint32_t kClosed = 0xffffffff;  // nobody will answer any more
constexpr uint32_t kNotComputed = 2;

// All experts of a layer, in memory that stays as it is while messages are answered.
struct MailLayer {
    Gate gate;
    Number number = Number::kFp32;
    int64_t hidden = 0, width = 0;
    std::vector<Expert> experts;
};

// Answers messages on a thread of its own, which computes as every caller of run() does. The sum over a message's
// experts is that of make_ffn, in the order of the message.
//
// The thread starts when it is armed first. It looks for messages without a pause for some milliseconds after it was
// armed and after each message, then more and more rarely; whoever expects any arms it. Methods may be called from any
// thread but one at a time. In a fork of its process it refuses, and is not to be destroyed.
class Mailbox {
  public:
    explicit Mailbox(const Letters& letters);
    ~Mailbox();

    // Replaces what is known of a layer, or adds the next one; not while armed. Throws std::invalid_argument.
    void set_layer(size_t index, MailLayer layer);

    // Returns at once. Throws PoolError in a fork, once closed, and where the system gives no thread.
    void arm();

    // No message is being answered any more when this returns, and none will be until `arm`; those that are there by
    // now count as answered, for nobody wants them.
    void pause();

    // For good; nobody will get an answer, and who waits for one is told so. Idempotent.
    void close();

    bool in_fork() const { return getpid() != pid_; }
    uint64_t messages() const { return messages_.load(); }  // answered so far
    std::string failure() const;                            // why an answer is none; empty: there was none such

  private:
    void start();
    void serve();
    bool has_message() const;
    void answer();
    void compute();
    void wait(uint32_t seen, double idle_s);

    const pid_t pid_ = getpid();
    const Letters letters_;
    std::atomic<bool> armed_{false}, closing_{false}, sleeping_{false};
    std::atomic<uint64_t> messages_{0};
    FutexWord word_{0};  // changes whenever the thread is to look again
    std::thread thread_;
    mutable std::mutex failure_mutex_;
    std::string failure_;

    std::mutex mutex_;  // held while a message is answered; guards all below
    std::vector<MailLayer> layers_;
};

// For the end of the process: closes all there are. Does nothing for those of the process that this is a fork of.
void stop_mailboxes();

}  // namespace moert
